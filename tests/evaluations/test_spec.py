from core.evaluations.spec import labels_to_draw


def test_pictures_are_drawn_in_the_proportion_of_the_held_out_ones_whatever_the_case() -> None:
    assert labels_to_draw(["Dog", "cat", "cat", "CAT"], ["cat", "dog"], images=8) == [0] * 6 + [1] * 2


def test_classes_that_differ_in_case_alone_are_both_drawn() -> None:
    assert labels_to_draw(["Cat", "cat"], ["Cat", "cat"], images=4) == [0, 0, 1, 1]


def test_other_classes_than_the_models_are_drawn_evenly() -> None:
    assert labels_to_draw(["cat", "fish"], ["cat", "dog"], images=4) == [0, 1, 0, 1]
