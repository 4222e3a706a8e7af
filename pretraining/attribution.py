"""Who drew the pretraining pictures, and under which licences, as the packages themselves say it."""

import json
from collections.abc import Sequence
from pathlib import Path

HEAD = """# Attribution

The base in this folder was trained on pictures drawn from the packages below: at 64 x 64 on white, without skin tone
variants, sorted into 32 classes, and mirrored where a mirror image means the same. No picture ships in this folder;
the contact sheet shows what the model draws.

| set | author | licence | package, version | source |
|---|---|---|---|---|
"""

TAIL = """
Classes come from the subcategories in `emoji.json` of `emoji-datasource` {version} (MIT, Cal Henderson). None of that
package's picture sheets was used. Share-alike sets (OpenMoji) and proprietary ones (Apple, Facebook) were left out.

Licence texts: Apache-2.0 <https://www.apache.org/licenses/LICENSE-2.0>, CC BY 4.0
<https://creativecommons.org/licenses/by/4.0/>. MIT: Copyright (c) Microsoft Corporation for Fluent Emoji, Copyright (c)
2013 Cal Henderson for emoji-datasource; permission is granted, free of charge, to any person obtaining a copy of this
software and associated documentation files, to deal in the software without restriction, including without limitation
the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies, provided that the copyright
notice and this permission notice are included in all copies or substantial portions. The software is provided "as is",
without warranty of any kind.
"""


def attribution(modules: Path, styles: Sequence[str]) -> str:
    """The text of ATTRIBUTION.md, from each package's `info.json`."""
    rows: list[str] = []
    for style in styles:
        package = modules / "@iconify-json" / style
        info = json.loads((package / "info.json").read_text())
        version = json.loads((package / "package.json").read_text())["version"]
        licence = f"[{info['license']['spdx']}]({info['license']['url']})"
        author = info["author"]
        rows.append(
            f"| {info['name']} | {author['name']} | {licence} | `@iconify-json/{style}` {version} | {author['url']} |"
        )
    datasource = json.loads((modules / "emoji-datasource" / "package.json").read_text())["version"]
    return HEAD + "\n".join(rows) + "\n" + TAIL.format(version=datasource)
