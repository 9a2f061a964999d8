"""The command line as a user meets it: one-line errors, exit codes, interruption and resuming."""

import inspect
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path

import pandas as pd
import pytest
import typer

import interp
from interp.commands import Deferred, Job, command_of
from interp.registry import ANALYSES, Analysis, analysis_called
from interp.run.resume import Checkpoint
from interp.terminal import print_table
from tests.families import FAMILIES
from tests.ground_truth.induction_model import induction_model


def assert_one_line(err: str, *words: str) -> None:
    assert err.startswith("interp: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in err, err


def test_heads_writes_a_whole_report(run, folder, tmp_path):
    out = tmp_path / "report"
    code, text, _ = run("heads", folder, "--out", out, "--prompts", 8)
    assert code == 0
    assert "L1H2" in text and "report.html" in text
    files = {path.name for path in out.iterdir()}
    assert files == {
        "report.json", "heads.parquet", "heads.csv", "ov_tokens.parquet", "ov_tokens.csv",
        "power.parquet", "power.csv",
        "arrays.safetensors", "report.html",
    }  # fmt: skip
    saved = interp.Report.load(out)
    assert saved.meta["model"]["n_layers"] == 2
    pd.testing.assert_frame_equal(saved.table, pd.read_parquet(out / "heads.parquet"))
    found = saved.table.set_index(["layer", "head"])["labels"]
    assert found[1, 2] == "induction,copying"


def test_report_is_the_same_under_the_same_seed(run, folder, tmp_path):
    for name in ("one", "two"):
        assert run("heads", folder, "--out", tmp_path / name, "--prompts", 8, "--seed", 3)[0] == 0
    one, two = (interp.Report.load(tmp_path / name) for name in ("one", "two"))
    pd.testing.assert_frame_equal(one.table, two.table)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["heads", "smollm2-13m"], ["smollm2-13m", "smollm2-135m"]),
        (
            ["heads", "smollm2-135m", "--detectors", "inducton"],
            ["inducton", "did you mean 'induction'"],
        ),
        (["heads", "smollm2-135m", "--detectors", ","], ["--detectors"]),
        (["heads", "smollm2-135m", "--prompts", "2"], ["prompts=2", "at least 4"]),
        (["inspect", "no/such/folder"], ["no/such/folder"]),
        (["heads", "smollm2-135m", "--device", "cudda"], ["cudda"]),
        (["heads", "smollm2-135m", "--dtype", "float23"], ["float23"]),
    ],
)
def test_bad_input_is_one_line_and_exit_2(run, tmp_path, arguments, words):
    if arguments[0] == "heads":
        arguments = [*arguments, "--out", tmp_path / "out"]
    code, _, err = run(*arguments)
    assert code == 2
    assert_one_line(err, *words)
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize(
    ("typed", "near"), [(["haeds", "x"], "'heads'"), (["sae", "trian", "x"], "'train'")]
)
def test_unknown_command_names_the_nearest(run, typed, near):
    code, _, err = run(*typed)
    assert code == 2
    assert_one_line(err, f"no {' '.join([*typed[:-2], 'command'])}", f"did you mean {near}?")


def test_unknown_option_names_the_nearest(run):
    code, _, err = run("heads", "smollm2-135m", "--prompt", 8)
    assert code == 2
    assert "--prompts" in err and "Traceback" not in err


def test_damaged_models_are_told_apart(run, folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text((folder / "config.json").read_text())
    code, _, err = run("heads", empty, "--out", tmp_path / "out")
    assert code == 2
    assert_one_line(err, "empty")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in folder.iterdir():
        content = path.read_bytes()
        (broken / path.name).write_bytes(
            content[: len(content) // 2] if path.suffix == ".safetensors" else content
        )
    code, _, err = run("heads", broken, "--out", tmp_path / "out")
    assert code == 2
    assert_one_line(err, "safetensors")
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + b"\0" * 64)
    code, _, err = run("heads", bad, "--out", tmp_path / "out")
    assert code == 2
    assert_one_line(err, "bad.gguf")


def test_nan_weights_are_named(run, tmp_path):
    model = induction_model()
    model.transformer.h[1].attn.c_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    code, _, err = run("inspect", tmp_path / "nan")
    assert code == 2
    assert_one_line(err, "h.1.attn.c_proj.weight")


def test_unwritable_output_is_found_before_loading(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("interp.open.load", lambda *a, **k: pytest.fail("loaded the model first"))
    code, _, err = run("heads", "smollm2-135m", "--out", tmp_path / "file" / "out")
    assert code == 1
    assert_one_line(err, "cannot write", "--out")


def test_full_disk_leaves_no_half_report_and_resume_finishes(run, folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    fsync = os.fsync
    written = []

    def full_at_the_report(handle: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
        written.append(name)
        if name.startswith(".report.html"):
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full_at_the_report)
    code, _, err = run("heads", folder, "--out", out, "--prompts", 4)
    assert code == 1
    assert_one_line(err, "No space left", "--resume")
    assert [path.name for path in out.iterdir()] == [".partial"]
    monkeypatch.setattr(os, "fsync", fsync)
    assert run("heads", folder, "--out", out, "--prompts", 4, "--resume")[0] == 0
    assert (out / "report.json").exists() and not (out / ".partial").exists()


def test_interrupted_run_keeps_its_units_and_resumes(run, folder, tmp_path, monkeypatch):
    computed: list[str] = []
    compute = Checkpoint.compute

    def stop_at_the_third(self, name, unit):
        def counted():
            if len(computed) == 2:
                raise KeyboardInterrupt
            computed.append(name)
            return unit()

        return compute(self, name, counted)

    monkeypatch.setattr(Checkpoint, "compute", stop_at_the_third)
    out = tmp_path / "out"
    code, _, err = run("heads", folder, "--out", out, "--prompts", 40)
    assert code == 130
    assert_one_line(err, "--resume")
    finished = list(computed)
    computed.clear()

    def counted(self, name, unit):
        return compute(self, name, lambda: (computed.append(name), unit())[1])

    monkeypatch.setattr(Checkpoint, "compute", counted)
    assert run("heads", folder, "--out", out, "--prompts", 40, "--resume")[0] == 0
    assert computed and not set(computed) & set(finished)
    whole = tmp_path / "whole"
    assert run("heads", folder, "--out", whole, "--prompts", 40)[0] == 0
    pd.testing.assert_frame_equal(interp.Report.load(out).table, interp.Report.load(whole).table)


@pytest.mark.parametrize("command", ["inspect", "lens"])
def test_ctrl_c_while_a_model_loads_is_one_line(run, tmp_path, monkeypatch, command):
    def interrupted(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("interp.open.load", interrupted)
    more = ["a prompt", "--out", tmp_path / "out"] if command == "lens" else []
    code, _, err = run(command, "smollm2-135m", *more)
    assert code == 130
    assert_one_line(err, "stopped", "no result was written")


def test_a_folder_of_other_files_is_never_emptied(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(interp.InterpError, match="holds other files"):
        Checkpoint(tmp_path, {"seed": 0})
    assert (tmp_path / "thesis.tex").exists()


def test_resume_refuses_other_options(run, folder, tmp_path, monkeypatch):
    def interrupted(self, name, unit):
        raise KeyboardInterrupt

    compute = Checkpoint.compute
    monkeypatch.setattr(Checkpoint, "compute", interrupted)
    assert run("heads", folder, "--out", tmp_path, "--prompts", 8)[0] == 130
    monkeypatch.setattr(Checkpoint, "compute", compute)
    code, _, err = run("heads", folder, "--out", tmp_path, "--prompts", 8, "--seed", 1, "--resume")
    assert code == 2
    assert_one_line(err, "seed", "--resume")


@pytest.mark.slow
def test_ctrl_c_on_the_default_model(tmp_path):
    command = [
        sys.executable, "-m", "interp", "heads", "smollm2-135m", "--out", str(tmp_path),
        "--prompts", "16", "--detectors", "induction", "--no-ablate",
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A job that a shell has put in the background ignores SIGINT, and hands that on to what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".partial/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "--resume" in err.strip().splitlines()[-1]
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "report.json").read_text())["model"]["n_layers"] == 30


def test_inspect_prints_the_map(run, folder):
    code, text, _ = run("inspect", folder)
    assert code == 0
    assert "attn.c_proj" in text and "FAILS" not in text
    code, text, _ = run("inspect", folder, "--json")
    spec = json.loads(text)
    assert spec["blocks"][1]["W_O"] == "transformer.h.1.attn.c_proj"
    assert all(check["passed"] for check in spec["checks"])


def test_inspect_fails_where_a_site_is_refused_not_where_something_stands_between_blocks(
    run, tmp_path, monkeypatch
):
    FAMILIES["hrm_text"]().save_pretrained(tmp_path / "hrm")
    code, text, _ = run("inspect", tmp_path / "hrm")
    assert code == 0
    assert "FAILS" not in text and "done to the residual stream between blocks" in " ".join(
        text.split()
    )
    checks = json.loads(run("inspect", tmp_path / "hrm", "--json")[1])["checks"]
    assert [c["name"] for c in checks if c["verdict"] == "no"] == ["stream"]
    monkeypatch.setattr("interp.models.verify.relative_error", lambda got, wanted: (1.0, ""))
    code, text, _ = run("inspect", tmp_path / "hrm")
    assert code == 1 and "FAILS" in text


@pytest.mark.parametrize("width", [50, 80])
def test_listings_of_models_are_printed_as_other_tables(run, folder, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    for command, said in ((["models"], "smollm2-135m"), (["inspect", folder], "attn.c_proj")):
        _, text, _ = run(*command)
        assert said in text and not set("┃│┏┌") & set(text)
        assert max(map(len, text.splitlines())) <= width


def test_models_lists_the_embedded_default(run):
    code, text, _ = run("models", "--json")
    assert code == 0
    assert json.loads(text)[0]["model"] == "smollm2-135m"


COMMANDS = [
    " ".join(filter(None, command_of(entry.name)))
    for entry in entry_points(group="interp.analyses")
]


@pytest.mark.parametrize("command", ["inspect", "models", "detectors", *COMMANDS])
def test_help_shows_an_example(run, command):
    code, text, _ = run(*command.split(), "--help")
    assert code == 0
    assert f"interp {command}" in " ".join(text.replace("Usage: interp", "").split())


def test_help_names_what_several_arguments_are(run):
    for command, shown in (
        ("emergence", ["SERIES", "folders with step-<n> checkpoints"]),
        ("compare-weights", ["MODEL", "the base, then its fine-tuned"]),
        ("compare", ["FOLDER", "Folders of saved reports, of interp heads"]),
    ):
        text = " ".join(run(command, "--help")[1].replace("│", " ").split())
        assert f"{command} [OPTIONS] {{{shown[0]}}}..." in text and shown[1] in text


def test_version_is_the_installed_one(run):
    code, text, _ = run("--version")
    assert code == 0 and text == f"interp-suite {version('interp-suite')}\n"


def test_detectors_are_listed_with_cost_and_source(run):
    code, text, _ = run("detectors", "--json")
    rows = {row["name"]: row for row in json.loads(text)}
    assert code == 0 and rows["induction"]["cost"] == "fast"
    assert "Olsson" in rows["induction"]["source"]
    shown = run("detectors")[1]
    assert "induction  labels · cost fast · prompts repeated · unit attention mass" in shown
    assert "    source: Olsson et al. 2022" in shown


def test_what_can_be_done_is_listed_without_importing_torch():
    code = "import sys; sys.argv = ['interp', '--help']\nfrom interp.cli import main\n"
    code += "try: main()\nfinally: print('torch' in sys.modules)"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert text.rstrip().endswith("False")
    shown = " ".join(text.split())
    for command in COMMANDS:
        assert f"│ {command.split()[0]} " in shown, command
    assert "Every attention head's roles" in shown


def test_a_table_keeps_headers_and_numbers_whole_in_any_width(monkeypatch, capsys):
    rows = pd.DataFrame(
        {"text": ["x" * 40], "gain": [-1234.5678], "gain_low": [-1300.25], "note": ["y" * 30]}
    )
    for width, shown in (
        (100, ["text", "gain", "gain_low", "note"]),
        (60, ["text", "gain", "gain_low", "note"]),
        (50, ["text", "gain", "note"]),
        (36, ["text", "gain"]),
        (20, ["text"]),
    ):
        monkeypatch.setenv("COLUMNS", str(width))
        print_table(rows, where="DIR/x.csv")
        text = capsys.readouterr().out
        lines = text.splitlines()
        assert lines[1].split() == shown and max(map(len, lines)) <= width
        assert ("-1234.568" in text) == ("gain" in shown)
        hidden = [name for name in rows if name not in shown]
        plural = "s" if len(hidden) > 1 else ""
        said = f"… {len(hidden)} more column{plural} in DIR/x.csv: {', '.join(hidden)}"
        assert (said in " ".join(text.split())) == bool(hidden)


def example(
    model,
    prompt: str | Sequence[str],
    *,
    sites: Sequence[str] = ("z", "resid_post"),
    layers: Sequence[int] | None = None,
    exact: bool = False,
    hidden: dict | None = None,
) -> interp.Report:
    """A report that shows what came from the shell.

    It computes nothing.

    Args:
        prompt: the text. sites: names,
            and more names.
        layers: numbers.

    Returns: a Report.
    """
    table = pd.DataFrame({"option": ["sites", "layers"], "given": [str(sites), str(layers)]})
    return interp.Report("example", {"example": table}, {}, {"notes": [f"exact is {exact}"]})


def shell(monkeypatch, *arguments: str) -> list[Job]:
    """The jobs that a shell call of `example` asks for."""
    made = Analysis("example", example, "nobody 2000", "interp example M P", "", print, print)
    monkeypatch.setitem(ANALYSES, "example", made)
    entry = EntryPoint("example", f"{__name__}:example", "interp.analyses")
    jobs: list[Job] = []
    context = Deferred("example", entry, jobs.append).make_context("example", [*arguments])
    context.command.invoke(context)
    return jobs


def test_arguments_and_options_come_from_the_signature(monkeypatch):
    (job,) = shell(monkeypatch, "m", "some text", "--layers", "3, 4", "--exact", "--device", "cpu")
    assert job.sources == ("m",) and job.arguments == {"prompt": "some text"}
    assert job.options == {"sites": ["z", "resid_post"], "layers": [3, 4], "exact": True}
    assert job.loading["device"] == "cpu" and job.out is None and not job.resume


@pytest.mark.parametrize("entry", entry_points(group="interp.analyses"), ids=lambda e: e.name)
def test_the_example_is_a_call_and_leaves_the_rest_at_its_defaults(entry):
    """What `--help` shows can be typed; an option that is not given is the function's own default."""
    typed = shlex.split(analysis_called(entry.name).example)[1:]
    name = " ".join(filter(None, command_of(entry.name)))
    assert " ".join(typed).startswith(name)
    rest = typed[len(name.split()) :]
    jobs: list[Job] = []
    context = Deferred(name, entry, jobs.append).make_context(name, [*rest])
    context.command.invoke(context)
    known = inspect.signature(jobs[0].analysis.function).parameters
    given = {word.removeprefix("--").replace("-", "_") for word in rest if word.startswith("--")}
    for option, value in jobs[0].options.items():
        if not {option, f"no_{option}"} & given:
            default = known[option].default
            several = default.split(",") if isinstance(default, str) else default
            assert value == (list(several) if isinstance(value, list) else default), option


@pytest.mark.parametrize("given", [",", "three"])
def test_a_list_that_is_none_is_refused(monkeypatch, given):
    with pytest.raises(interp.InterpError, match="--layers"):
        shell(monkeypatch, "m", "text", "--layers", given)


def test_help_of_options_comes_from_the_docstring(monkeypatch, capsys):
    with pytest.raises(typer.Exit):
        shell(monkeypatch, "--help")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for text in ("It computes nothing.", "names, and more names.", "numbers.", "nobody 2000"):
        assert text in shown, shown
    assert "--hidden" not in shown
