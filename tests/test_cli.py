"""The command line: what a user types, asks for and mistypes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import shardspec as ss
from shardspec.catalog import CATALOG
from shardspec.cli import COMMANDS, main
from tests import cli_page

ROOT = Path(__file__).parent.parent
RULES = "models.llama:RULES"
BATCH = ("--batch", "8", "--seq", "128")
LLAMA = ("--model", "models.llama:debug", *BATCH)
MESH = ("--mesh", "fsdp=2,tp=2")


def run(*words: str, directory: Path = ROOT) -> Result:
    """Run a line in a directory; an error that is no exit is raised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setattr(sys, "path", [*sys.path])
        patch.delenv("WORLD_SIZE", raising=False)
        try:
            return CliRunner(catch_exceptions=False).invoke(main, words, prog_name="shardspec")
        finally:
            sys.modules.pop("mine", None)


def succeeds(*words: str, directory: Path = ROOT) -> str:
    result = run(*words, directory=directory)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def mistyped(*words: str, directory: Path = ROOT) -> str:
    """The line that tells a mistake in the arguments."""
    result = run(*words, directory=directory)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Usage: shardspec")
    return result.stderr.partition("Error: ")[2].strip()


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    path.write_text(succeeds("plan", RULES, *LLAMA, *MESH, "--json"))
    return path


def test_a_right_table_passes_with_a_line():
    assert succeeds("check", RULES, *LLAMA, *MESH) == (
        "models.llama:RULES passes for models.llama:debug on fsdp=2, tp=2 (4 ranks)\n"
    )


@pytest.mark.parametrize(("family", "batch"), [("gpt2", BATCH), ("vit", ("--batch", "8"))], ids=["gpt2", "vit"])
def test_each_family_has_a_batch_and_presets_for_the_command_line(family, batch):
    words = ("--model", f"models.{family}:debug", *batch, "--mesh", "dp=2,tp=2")
    assert "passes for" in succeeds("check", f"models.{family}:RULES", *words)


def test_a_wrong_table_is_told_on_stderr_with_status_1():
    result = run("check", RULES, *LLAMA, "--mesh", "tp=8")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error[SS301]: ")
    assert "fix: tp in {1, 2, 4}" in result.stderr
    assert "\x1b" not in result.stderr


def test_colour_is_shown_where_it_is_asked_for_and_not_where_no_color_is_set(monkeypatch):
    words = ("check", RULES, *LLAMA, "--mesh", "tp=8", "--color")
    assert "\x1b[31m\x1b[1merror[SS301]\x1b[0m: " in run(*words, "always").stderr
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in run(*words, "auto").stderr
    assert run("--color", "always", "check", RULES, *LLAMA, "--mesh", "tp=8", "--color", "never").stderr.isascii()


def test_a_plan_is_printed_as_python_prints_it_and_as_json(plan_file):
    plan = ss.Plan.from_json(plan_file.read_text())
    assert succeeds("plan", RULES, *LLAMA, *MESH) == f"{plan}\n"
    assert json.loads(plan_file.read_text())["mesh"] == {"fsdp": 2, "tp": 2}


def test_a_page_is_written_and_nothing_else_printed(tmp_path, plan_file):
    path = tmp_path / "plan.html"
    assert succeeds("plan", RULES, *LLAMA, *MESH, "--html", str(path)) == ""
    assert path.read_text() == ss.Plan.from_json(plan_file.read_text()).to_html()


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("rules", (r"layers\.\d+\.attention\.w[kv]\.weight", "(K@tp hd)@fsdp D", "models/llama/rules.py:13")),
        ("claims", ("layers.*.attention.wq.weight", "128x128", "factors: V = 256, D = 128")),
        (
            "program",
            ("layers.*(%5, %9, %13) and so on, 4 calls", "declared as layers.*.attention", "reduce_scatter tp"),
        ),
        ("plan", ("plan for fsdp=2, tp=2 (4 ranks)",)),
    ],
)
def test_every_stage_can_be_seen(stage, words):
    text = succeeds("plan", RULES, *LLAMA, *MESH, "--emit", stage)
    for part in words:
        assert part in text


def test_a_stage_before_the_mistake_is_shown_and_one_behind_it_is_shown_with_the_mistake(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from models.llama import RULES as R\n"
        "RULES = R.override(drop=[r'layers\\.\\d+\\.(attention|feed_forward):in|output:in'])\n"
    )
    words = ("plan", "mine:RULES", *LLAMA, *MESH, "--emit")
    assert "layers.*.attention" in succeeds(*words, "claims", directory=tmp_path)
    result = run(*words, "program", directory=tmp_path)
    assert result.exit_code == 1
    assert "refused" in result.stdout
    assert result.stderr.startswith("error[SS30")


def test_the_legal_meshes_of_a_world_are_those_of_the_plan(plan_file):
    from models.llama import RULES as TABLE
    from models.llama import build, inputs

    plan = ss.compile(lambda: build("debug"), TABLE, ss.Mesh(fsdp=2), inputs(8, 128))
    lines = succeeds("legal", RULES, *LLAMA, "--world", "8").splitlines()
    assert lines[0] == "18 meshes of 8 ranks pass for models.llama:debug"
    assert [line.split()[0] for line in lines[5:]] == [str(mesh) for mesh in plan.legal_meshes(8)]


def test_a_mesh_is_set_beside_the_legal_ones():
    lines = succeeds("legal", RULES, *LLAMA, "--world", "2", *MESH).splitlines()
    assert lines[0] == "4 meshes of 2 ranks pass for models.llama:debug"
    assert [line.split()[0] for line in lines if line.endswith("given")] == ["fsdp=2,tp=2"]


def test_no_legal_mesh_is_an_answer_and_a_table_that_is_wrong_on_one_rank_is_told(tmp_path):
    assert succeeds("legal", RULES, *LLAMA, "--world", "7").startswith("0 meshes of 7 ranks pass")
    (tmp_path / "mine.py").write_text(
        "from models.llama import RULES as R\nRULES = R.override(drop=['rope_(cos|sin)'])\n"
    )
    result = run("legal", "mine:RULES", *LLAMA, "--world", "2", directory=tmp_path)
    assert result.exit_code == 1
    assert result.stderr.startswith("error[SS202]: no rule claims buffer rope_cos")


def test_equal_plans_have_no_difference_whether_from_a_file_or_a_table(plan_file):
    assert succeeds("diff", str(plan_file), str(plan_file)) == ""
    assert succeeds("diff", str(plan_file), RULES, *LLAMA, *MESH) == ""


def test_tables_and_meshes_are_compared():
    text = succeeds("diff", f"{RULES}@fsdp=4", f"{RULES}@fsdp=2,tp=2", *LLAMA)
    assert text.startswith("mesh: fsdp=4 -> fsdp=2,tp=2\n")
    assert "layers.*.attention.wo.weight" in text
    text = succeeds("diff", RULES, "models.llama:WITHOUT_SP", *LLAMA, *MESH)
    assert "messages over tp, forward     4.5 MiB   2.2 MiB" in text


# What can be mistyped


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("chek",), "no command 'chek'; did you mean check?"),
        (("explain", "SS3011"), "no code SS3011; did you mean SS31"),
        (("check", "models.lama:RULES", *LLAMA), "there is no module models.lama; did you mean models.llama?"),
        (("check", "model.llama:RULES", *LLAMA), "there is no module model; did you mean models?"),
        (("check", "models.llama:RULE", *LLAMA), "models.llama has no RULE; did you mean RULES?"),
        (("check", "models.llama", *LLAMA), "'models.llama' is not module:name, as in models.llama:RULES"),
        (("check", "models..llama:RULES", *LLAMA), "there is no module models."),
        (("check", "models/llama/rules.py:RULES", *LLAMA), "not a file: models.llama.rules:RULES"),
        (("check", "models.llama:PRESETS", *LLAMA), "models.llama:PRESETS is a dict, not a Rules"),
        (("check", RULES, "--model", "models.llama:deubg", *BATCH), "has no preset 'deubg'; did you mean debug?"),
        (("check", RULES, "--model", "models.llama:x", *BATCH), "there are debug, 1b, 8b, 70b, 405b"),
        (("check", RULES, "--model", "models.llama:PRESETS", *BATCH), "PRESETS is a dict; a model is a preset"),
        (("check", RULES, "--model", "models.llama:LlamaConfig", *BATCH), "raises TypeError: "),
        (("check", RULES, "--model", "builtins:dict", *BATCH), "builtins has no function inputs(batch, seq)"),
        (("check", RULES, "--model", "models.llama:debug", "--seq", "8"), "--batch is missing: models.llama.inputs("),
        (("check", RULES, "--model", "models.llama:debug", "--batch", "8"), "--seq is missing: models.llama.inputs("),
        (("check", RULES, *LLAMA, "--batch", "-3"), "Invalid value for '--batch': -3 is not in the range x>=1."),
        (("check", RULES, *LLAMA, "--seq", "0"), "Invalid value for '--seq': 0 is not in the range x>=1."),
        (("check", RULES, *LLAMA, "--batch", "many"), "'many' is not a valid integer"),
        (("check", RULES, *LLAMA, "--mesh", "tpp=2"), "'tpp=2' is not axis=size"),
        (("check", RULES, *LLAMA, "--mesh", "fdsp=2"), "did you mean fsdp?"),
        (("check", RULES, *LLAMA, "--mesh", "tp=-2"), "'-2' is not a size"),
        (("check", RULES, *LLAMA, "--mesh", "tp=0"), "mesh axis tp has size 0"),
        (("check", RULES, *LLAMA, "--mesh", "fsdp=auto"), "nothing tells the world size"),
        (("check", RULES, *LLAMA, "--inputs", "models.llama:inputz"), "has no inputz; did you mean inputs?"),
        (("check", RULES, *LLAMA, "--inputs", RULES), f"--inputs {RULES} is a Rules, not a function"),
        (("check", RULES, *LLAMA, "--inputs", "models.llama:build"), "takes preset; it is given those of model"),
        (("check", RULES, *LLAMA, "--loss", RULES), f"--loss {RULES} is a Rules, not a function"),
        (("check", "models.vit:RULES", "--model", "models.vit:debug", *BATCH), "--seq is of no use"),
        (("plan", RULES, *LLAMA, "--json", "--emit", "plan"), "--json and --emit both print"),
        (("plan", RULES, *LLAMA, "--emit", "ruels"), "'ruels' is not one of 'rules', 'claims', 'program', 'plan'"),
        (("plan", RULES, *LLAMA, "--html", "no/such/folder/x.html"), "No such file or directory"),
        (("legal", RULES, *LLAMA, "--world", "-1"), "-1 is not in the range x>=1"),
        (("diff", "absent.json", "absent.json"), "absent.json: No such file or directory"),
        (("diff", "README.md", "README.md"), "README.md: this is no plan: "),
        (("diff", RULES, RULES), f"{RULES} is a table, or no file: a table needs --model"),
        (("diff", RULES, f"{RULES}@tp=x", *LLAMA), "'x' is not a size"),
    ],
)  # fmt: skip
def test_what_can_be_mistyped_is_told_in_a_line(words, told):
    assert told in mistyped(*words)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("def build(x):\n    return {}[x]\n", "mine:any raises KeyError: 'any'\n  --> mine.py:2   return {}[x]"),
        ("from torch import nn\ndef any():\n    return nn.Linear(3, [])\n", "mine.py:3   return nn.Linear(3, [])"),
        ("def any():\n    return 3\n", "--model mine:any builds a int, not a torch.nn.Module"),
        ("any = 1 / 0\n", "imported: ZeroDivisionError: division by zero\n  --> mine.py:1   any = 1 / 0"),
        ("def any(:\n", "imported: SyntaxError: invalid syntax\n  --> mine.py:1   def any(:"),
        ("import nowhere_at_all\n", "No module named 'nowhere_at_all'\n  --> mine.py:1   import nowhere_at_all"),
        ("import sys\nsys.exit(0)\n", "mine cannot be imported: SystemExit: 0\n  --> mine.py:2   sys.exit(0)"),
        ("from torch.nn import Identity as any\ninputs = 3\n", "mine.inputs is a int, not a function"),
        ("from torch.nn import Identity as any\ndef inputs(batch, seq):\n    return batch\n", "the batch is a int"),
        ("from torch.nn import Identity as any\ndef inputs():\n    raise OSError('gone')\n", "--batch is of no use"),
    ],
)  # fmt: skip
def test_a_users_own_code_that_raises_is_told_with_its_line(tmp_path, source, told):
    inputs = "" if "inputs" in source else "def inputs(batch, seq):\n    return {}\n"
    (tmp_path / "mine.py").write_text(source + inputs)
    assert told in mistyped("check", RULES, "--model", "mine:any", *BATCH, directory=tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "this is no plan: Expecting value"),
        ("[]", "this is no plan: a JSON object with a version"),
        ('{"version": 1}', "this is no plan: a JSON object with a version"),
        (
            '{"version": 99}',
            "the plan has version 99, written by a newer shardspec; this one reads version 2",
        ),
        ('{"version": 2, "mesh": {"tp": 0}}', "the plan cannot be read: "),
        ("\x00", "this is no plan: "),
    ],
)
def test_a_file_that_is_no_plan_is_told_by_name(tmp_path, plan_file, text, told):
    path = tmp_path / "other.json"
    path.write_text(text)
    assert mistyped("diff", str(plan_file), str(path)).startswith(f"{path}: {told}")


def test_bytes_that_are_no_text_are_no_plan(tmp_path, plan_file):
    path = tmp_path / "other.json"
    path.write_bytes(b"\xff\xfe\x80")
    assert "this is no plan: it is not even text" in mistyped("diff", str(plan_file), str(path))


def test_help_names_every_command_with_a_line_and_without_torch():
    script = (
        "import sys; from shardspec.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    *text, torch_there = done.stdout.splitlines()
    for name in COMMANDS:
        assert any(line.startswith(f"  {name} ") for line in text)
    assert torch_there == "False"


def test_two_files_are_compared_without_importing_torch(plan_file, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(succeeds("plan", RULES, *LLAMA, "--mesh", "fsdp=4", "--json"))
    script = (
        "import sys; from shardspec.cli import main\n"
        f"try: main(['diff', {str(plan_file)!r}, {str(other)!r}])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.startswith("mesh: fsdp=2,tp=2 -> fsdp=4\n")
    assert done.stdout.splitlines()[-1] == "False"


def test_a_reader_that_leaves_early_sees_no_traceback():
    script = "import time; time.sleep(0.3); from shardspec.cli import main; main(['explain'])"
    line = f'"{sys.executable}" -c "{script}" | true'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_is_told_in_a_line(unbuffered):
    script = "from shardspec.cli import main; main(['explain'])"
    with Path("/dev/full").open("w") as full:
        streams = {"stdout": full, "stderr": subprocess.PIPE, "text": True}
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run([sys.executable, "-c", script], **streams, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 1
    assert done.stderr == "Error: the answer cannot be written: No space left on device\n"


def test_a_mistake_where_the_table_is_made_is_a_diagnostic(tmp_path):
    source = "from models.llama import RULES as R\nRULES = R.override(drop=['rope_(cos|sn)'])\n"
    (tmp_path / "mine.py").write_text(source)
    result = run("check", "mine:RULES", *LLAMA, directory=tmp_path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error[SS201]: ")
    assert "mine.py:2" in result.stderr


def test_the_page_of_the_command_line_shows_what_is_printed():
    """`python -m tests.cli_page` writes it."""
    text = cli_page.PAGE.read_text()
    assert text == cli_page.answered(text)
    assert {match[1].split()[0] for match in cli_page.BLOCK.finditer(text)} == set(COMMANDS)


@pytest.mark.parametrize("code", CATALOG)
def test_every_code_is_explained(code):
    text = succeeds("explain", code)
    assert text.startswith(f"{code}: {CATALOG[code].title}\n\n")
    assert CATALOG[code].explanation in text
