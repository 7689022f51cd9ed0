"""Fills the generated parts of README.md: each stands between the command that prints it and the
word "end".

Run `python docs/update_readme.py`; a test says when it is time.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"<!-- python (?P<command>.+?) -->\n(?P<body>.*?)<!-- end -->", re.DOTALL)
WIDE = {**os.environ, "COLUMNS": "100", "PYTHONUTF8": "1"}


def updated(text: str) -> str:
    """The text with every block filled anew."""
    return BLOCK.sub(_filled, text)


def _filled(block: re.Match[str]) -> str:
    command = [sys.executable, *block["command"].split()]
    printed = subprocess.run(
        command, cwd=README.parent, env=WIDE, capture_output=True, encoding="utf-8", check=True
    )
    body = printed.stdout.strip()
    # Markdown stands as it is; anything else is shown as the terminal shows it.
    body = body if body.startswith("#") else f"```text\n{body}\n```"
    return f"<!-- python {block['command']} -->\n{body}\n<!-- end -->"


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
