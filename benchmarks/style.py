"""How large the product is and how it reads: python benchmarks/style.py [CHECKOUT].

Prints tokens, code lines, tokens a line and the lengths of functions of `converter` and `calib`;
then, for a FULL_QUANT conversion of the shipped example, how many of the product's files it enters
and how many sessions of ONNX Runtime it opens, without and with reports.
"""

from __future__ import annotations

import ast
import os
import statistics
import subprocess
import sys
import tempfile
import tokenize
from pathlib import Path

ROOT = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]).resolve()
SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
# Runs one conversion and counts: files of the product entered, sessions opened.
COUNTED = """
import sys, threading, onnxruntime
root, files, opened = sys.argv.pop(1), set(), []
class Counted(onnxruntime.InferenceSession):
    def __init__(self, *args, **kwargs):
        opened.append(1)
        super().__init__(*args, **kwargs)
onnxruntime.InferenceSession = Counted
def note(frame, event, arg):
    name = frame.f_code.co_filename
    if name.startswith(root) and frame.f_code.co_name != "<module>":
        files.add(name)
sys.setprofile(note)
threading.setprofile(note)
from converter.cli import main
try:
    main()
except SystemExit:
    pass
sys.setprofile(None)
print("COUNTED", len(files), len(opened))
"""


def docstring_lines(tree: ast.Module) -> set[int]:
    """The numbers of the lines that docstrings take."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    scopes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    first = [scope.body[0] for scope in scopes if ast.get_docstring(scope)]
    return {line for node in first for line in range(node.lineno, (node.end_lineno or 0) + 1)}


def code_tokens(path: Path) -> list[int]:
    """The line of every token that is no comment, docstring or layout."""
    docs = docstring_lines(ast.parse(path.read_text(encoding="utf-8")))
    with path.open(encoding="utf-8") as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    return [t.start[0] for t in tokens if t.type not in SILENT and t.start[0] not in docs]


def function_lengths(path: Path) -> dict[str, int]:
    """Lines of every function, its docstring left out."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            first = node.body[0]
            said = (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(node) else 0
            length = (node.end_lineno or 0) - node.lineno + 1 - said
            found[f"{path.relative_to(ROOT)}:{node.name}"] = length
    return found


def conversion(*more: str) -> tuple[int, int]:
    """Files of the product entered, and sessions opened, by a conversion of the example."""
    with tempfile.TemporaryDirectory() as folder:
        text = (ROOT / "configs" / "full_quant.cfg").read_text(encoding="utf-8")
        text = text.replace("../examples", str(ROOT / "examples"))
        text = text.replace("[common_quant_param]", "\n".join(["[common_quant_param]", *more]))
        (Path(folder) / "job.cfg").write_text(text, encoding="utf-8")
        model = f"--modelFile={ROOT / 'examples/digits/digits_cnn.onnx'}"
        flags = [model, "--configFile=job.cfg", "--outputFile=q.onnx"]
        ran = subprocess.run(
            [sys.executable, "-c", COUNTED, str(ROOT), *flags],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
    counted = next(line for line in ran.stdout.splitlines() if line.startswith("COUNTED"))
    _, files, sessions = counted.split()
    return int(files), int(sessions)


def main() -> None:
    """Prints the figures."""
    paths = [
        path for part in ("converter", "calib") for path in sorted((ROOT / part).rglob("*.py"))
    ]
    tokens = {path: code_tokens(path) for path in paths}
    count = sum(map(len, tokens.values()))
    lines = sum(len(set(found)) for found in tokens.values())
    print(f"{count} tokens, {lines} code lines, {count / lines:.2f} tokens a line")
    lengths = {name: n for path in paths for name, n in function_lengths(path).items()}
    long = {name: n for name, n in lengths.items() if n > 50}
    print(
        f"functions: median {statistics.median(lengths.values())} lines, over 50: {long or 'none'}"
    )
    for what, more in (("a conversion", ()), ("with reports", ("debug_info_save_path = r",))):
        files, sessions = conversion(*more)
        print(f"{what}: {files} files entered, {sessions} sessions opened")


if __name__ == "__main__":
    main()
