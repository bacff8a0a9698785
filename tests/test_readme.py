"""The README's commands are the ones that work: CI runs its test command, the first ones print what it shows, options exist, links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import stm
from exporter.cli import _VERBS, _parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def stm_commands():
    """Every `stm ...` or `stm-export ...` line of a shell block."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    found = [re.sub(r"^(\.venv/bin/)", "", part).partition("#")[0].strip() for part in parts if re.match(r"(\.venv/bin/)?stm(-export)? ", part)]
    assert len(found) >= 4
    return found


@pytest.mark.parametrize("command", stm_commands())
def test_every_command_parses(command):
    program, *words = shlex.split(command)
    two = " ".join(words[:2])
    if program == "stm-export":
        _parser("export").parse_args(words)
    elif " " in two and two in _VERBS:
        _parser(two).parse_args(words[2:])
    else:
        _parser().parse_args(words)


def first_commands():
    """(command, what the README says it prints), in order."""
    section = re.search(r"^## First commands\n(.*?)^## ", README, re.S | re.M)
    assert section
    found = re.findall(r"```bash\n([^\n]*)\n```\n[^`]*```text\n(.*?)```", section[1], re.S)
    assert len(found) == 3
    return found


def without_numbers(lines):
    return [re.sub(r"\d[\d.,e-]*", "#", line).split() for line in lines]


@pytest.mark.skipif("TODO" in README, reason="vim-n is not trained yet: README.md has no figures")
def test_first_commands_print_what_the_readme_shows(tmp_path):
    """All but the installation; times, rounding errors and the last digits of shares differ between machines."""
    programs = {".venv/bin/stm-export": "-m exporter export", ".venv/bin/stm": "-m exporter", ".venv/bin/python": ""}
    for line, shown in first_commands():
        command = re.sub(r"^.* \.venv/bin/pip install -q \. && ", "", line).replace("samples/", f"{ROOT}/samples/")
        command = re.sub(r"\.venv/bin/\S+", lambda found: f"{shlex.quote(sys.executable)} {programs[found[0]]}", command)
        environ = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        ran = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        shown, printed = shown.splitlines(), ran.stdout.splitlines()
        assert without_numbers(printed) == without_numbers(shown)
        assert printed[0].split()[1:] == shown[0].split()[1:]  # the likeliest class, the model and its weights
        for wanted, got in zip(shown, printed, strict=True):
            if re.match(r"  (tokens|token-layers|GFLOPs)", wanted):
                assert got == wanted
            if share := re.match(r"  vim.onnx  top-1 ([\d.]+)%", wanted):
                assert abs(float(share[1]) - float(re.match(r"  vim.onnx  top-1 ([\d.]+)%", got)[1])) <= 1


def test_ci_runs_the_readme_test_command(tmp_path):
    """The script on a copy of the README whose command only leaves a mark."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_bytes((ROOT / ".ci" / "run").read_bytes())
    command = re.search(r"<!-- test command -->\n```bash\n(.*)\n```", README)
    assert command
    assert command.group(1).endswith(".venv/bin/python -m pytest -q")
    (tmp_path / "README.md").write_text(README.replace(command.group(1), "echo ran > mark"))
    subprocess.run(["bash", str(tmp_path / ".ci" / "run")], check=True, capture_output=True)
    assert (tmp_path / "mark").read_text() == "ran\n"


def test_flops_table_is_what_the_code_counts():
    rows = re.findall(r"^\| (none|stm-\d+) \| (\d+) \| (\d+) \| ([\d. /]+) \| ([\d. /]+) \|$", README, re.M)
    assert len(rows) == 5
    for name, left, removed, *figures in rows:
        for index, model in enumerate(("vim-t", "vim-s", "vim-b")):
            config = stm.model_config(model)
            plan = stm.make_plan(config) if name == "none" else stm.make_plan(config, preset=name)
            assert (plan.tokens_left, plan.token_layers_removed) == (int(left), int(removed))
            printed = [figure.split(" / ")[index].strip() for figure in figures]
            assert printed == [f"{stm.gflops_paper(config, plan):.3f}", f"{stm.gflops_true(config, plan):.3f}"], (name, model)


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
