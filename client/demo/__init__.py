"""The main job, told from beginning to end on real images, with a report to look at."""
