"""Settings: the paper's defaults, environment and flags, one-line refusals, and an import that does nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "pegasus_vae.py"

DEFAULTS = {
    "mode": "demo",
    "data_dir": Path("data"),
    "output_dir": Path("outputs"),
    "checkpoint_dir": Path("checkpoints"),
    "run_name": "paper",
    "device": "auto",
    "seed": 0,
    "image_size": 64,
    "base_channels": 64,
    "latent_dim": 512,
    "latent_size": 1,
    "blocks_per_stage": 1,
    "batch_size": 64,
    "epochs": 100,
    "lr": 4e-4,
    "kl_weight": 0.01,
    "reduction": "mean",
    "max_images": 0,
    "horse_weight": 0.6,
    "picks_per_class": 64,
}

PUBLIC = """Config EncoderBlock DecoderBlock Encoder Decoder VAE spatial kl_divergence vae_loss load_split load_images
batch_loss learning_step TrainingRun fit save_checkpoint load_checkpoint encode_mean decode_images evaluate make_pegasus
Choices Composition PicksFile ImagePicker compose WingComposer FlowPrior flow_matching_loss fit_prior load_prior draw_codes
mend_codes""".split()

# Imports the notebook with every file opened for writing, folder made and connection tried recorded.
WATCHED_IMPORT = """
import os, sys, time
import IPython, PIL.ImageOps, ipywidgets, matplotlib.pyplot, pydantic_settings, safetensors.torch, torch, torchvision
import tqdm.auto, torchvision.datasets.utils

deeds = []
def watch(event, arguments):
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and arguments[0] != os.devnull:
        deeds.append((event, arguments[0]))
    elif event in ("os.mkdir", "os.rename", "os.remove", "socket.connect", "subprocess.Popen"):
        deeds.append((event, arguments))

sys.addaudithook(watch)
started = time.process_time()  # of this process alone, whatever else the machine does
import pegasus_vae
seconds = time.process_time() - started
assert not deeds, deeds
assert seconds < 3, f"{seconds:.1f} seconds beyond the libraries"
missing = [name for name in sys.argv[1:] if not hasattr(pegasus_vae, name)]
assert not missing, missing
"""


@pytest.fixture
def clean(monkeypatch, tmp_path):
    """No PEGASUS_ variables, and a working folder without data."""
    for name in [name for name in os.environ if name.startswith("PEGASUS_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return monkeypatch


@pytest.fixture
def python(clean, tmp_path):
    """python(*arguments): run the interpreter in an empty folder and return what it said."""
    environment = os.environ | {
        "PYTHONPATH": str(SCRIPT.parent),
        "PYTHONDONTWRITEBYTECODE": "1",
        "MPLBACKEND": "Agg",
    }
    return lambda *arguments: subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_defaults_are_the_papers(pv, clean):
    assert pv.Config().model_dump() == DEFAULTS
    assert pv.read_config() == pv.Config()


def test_every_field_is_described_in_one_line(pv):
    descriptions = {name: field.description for name, field in pv.Config.model_fields.items()}
    assert list(descriptions) == list(DEFAULTS)
    assert all(text and "\n" not in text for text in descriptions.values()), descriptions


CHANGES = {
    "mode": "paper",
    "data_dir": "elsewhere",
    "run_name": "deep-2",
    "device": "cpu",
    "image_size": "96",
    "lr": "1e-3",
    "kl_weight": "0",
    "reduction": "sum",
    "picks_per_class": "16",
}


@pytest.mark.parametrize("field, text", CHANGES.items())
def test_a_field_is_set_by_its_variable_and_by_its_flag_and_the_flag_wins(pv, clean, field, text):
    expected = type(DEFAULTS[field])(text)
    assert getattr(pv.read_config(["--" + field.replace("_", "-"), text]), field) == expected
    clean.setenv(f"PEGASUS_{field.upper()}", text)
    assert getattr(pv.read_config(), field) == expected
    default = str(DEFAULTS[field])
    assert getattr(pv.read_config(["--" + field.replace("_", "-"), default]), field) == DEFAULTS[field]


@pytest.mark.parametrize("field", ["data_dir", "output_dir", "checkpoint_dir"])
def test_a_tilde_is_the_home_folder_also_where_no_shell_replaces_it(pv, clean, tmp_path, field):
    clean.setenv("HOME", str(tmp_path))
    clean.setenv(f"PEGASUS_{field.upper()}", "~/there")
    assert getattr(pv.read_config(), field) == tmp_path / "there"


REFUSED = {
    "too small": (["--epochs", "0"], "epochs", "1"),
    "too large": (["--horse-weight", "1.5"], "horse_weight", "1"),
    "not positive": (["--lr", "0"], "lr", "greater than 0"),
    "not finite": (["--lr", "nan"], "lr", "1"),
    "negative": (["--kl-weight", "-1"], "kl_weight", "0"),
    "no multiple of 16": (["--image-size", "50"], "image_size", "16"),
    "a word for a number": (["--batch-size", "many"], "batch_size", "integer"),
    "a fraction for a whole number": (["--latent-dim", "2.5"], "latent_dim", "integer"),
    "an unknown mode": (["--mode", "quick"], "mode", "'demo', 'smoke' or 'paper'"),
    "an unknown reduction": (["--reduction", "median"], "reduction", "'mean' or 'sum'"),
    "an unknown device": (["--device", "tpu"], "device", "cuda"),
    "a run name that leaves the folder": (["--run-name", "../x"], "run_name", r"[\w-]"),
    "an unknown flag": (["--epcohs", "3"], "--epcohs", "--help"),
    "a flag without a value": (["--epochs"], "--epochs", "expected one argument"),
}


@pytest.mark.parametrize("arguments, field, allowed", REFUSED.values(), ids=REFUSED)
def test_a_wrong_flag_is_refused_in_one_line_that_names_it_and_what_is_allowed(pv, clean, arguments, field, allowed):
    with pytest.raises(pv.ReaderError) as refusal:
        pv.read_config(arguments)
    message = str(refusal.value)
    assert field in message and allowed in message and "\n" not in message


@pytest.mark.parametrize(
    "variable, value, named, allowed",
    [
        ("PEGASUS_EPOCHS", "0", "epochs", "1"),
        ("PEGASUS_SEED", "x", "seed", "integer"),
        ("PEGASUS_EPOCH", "3", "PEGASUS_EPOCH", "PEGASUS_EPOCHS"),
    ],
)
def test_a_wrong_variable_is_refused_in_one_line_that_names_it_and_what_is_allowed(
    pv, clean, variable, value, named, allowed
):
    clean.setenv(variable, value)
    with pytest.raises(pv.ReaderError) as refusal:
        pv.read_config()
    message = str(refusal.value)
    assert named in message and allowed in message and "\n" not in message


def test_settings_cannot_be_changed_once_read(pv, cfg):
    with pytest.raises(ValueError, match="frozen"):
        cfg.epochs = 3


def test_auto_names_a_device_that_works(pv, cfg):
    assert pv.torch.ones(2, device=pv.find_device(cfg.model_copy(update={"device": "auto"}))).sum() == 2


def test_a_device_that_is_not_there_is_refused_by_name(pv, cfg):
    missing = f"cuda:{pv.torch.cuda.device_count()}"
    with pytest.raises(pv.ReaderError, match=missing):
        pv.find_device(cfg.model_copy(update={"device": missing}))
    assert pv.find_device(cfg.model_copy(update={"device": "cpu"})) == pv.torch.device("cpu")


def test_each_process_of_torchrun_has_a_gpu_of_its_own(pv, cfg, monkeypatch):
    monkeypatch.setattr(pv.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    for name in ("auto", "cuda"):
        assert pv.find_device(cfg.model_copy(update={"device": name})) == pv.torch.device("cuda:2")
    with pytest.raises(pv.ReaderError, match="cuda:1: torchrun gives each process a GPU of its own"):
        pv.find_device(cfg.model_copy(update={"device": "cuda:1"}))
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(pv.ReaderError, match="cuda:4: torch finds 4 such here"):
        pv.find_device(cfg.model_copy(update={"device": "cuda"}))


def test_jupyter_shows_a_refusal_in_one_line_without_a_traceback(pv, capsys):
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shell.user_ns["pv"] = pv
    shell.run_cell("raise pv.ReaderError('no such folder: make it')")
    said = capsys.readouterr()
    assert (said.out + said.err).strip() == "error: no such folder: make it"


def test_the_script_refuses_a_folder_where_it_cannot_write(python, tmp_path):
    (tmp_path / "file").write_text("in the way")
    run = python(SCRIPT, "--output-dir", "file/outputs")
    assert run.returncode != 0 and run.stderr.count("\n") == 1 and "PEGASUS_OUTPUT_DIR" in run.stderr


def test_the_script_refuses_a_wrong_value_with_one_line_and_no_traceback(python, tmp_path):
    run = python(SCRIPT, "--epochs", "0")
    assert run.returncode != 0 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and "epochs" in run.stderr and "Traceback" not in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_lists_every_flag_with_its_description(pv, clean, capsys):
    with pytest.raises(SystemExit):
        pv.read_config(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name, field in pv.Config.model_fields.items():
        assert f"--{name.replace('_', '-')} " in said and field.description in said


def test_importing_is_silent_quick_and_leaves_no_trace(python, tmp_path):
    run = python("-c", WATCHED_IMPORT, *PUBLIC)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


PAPER = ["--mode", "paper", "--image-size", "32", "--base-channels", "4", "--batch-size", "4", "--device", "cpu"]


def test_the_script_refuses_a_folder_that_cannot_teach_the_prior_what_a_horse_is_before_it_trains(
    python, image_folder, tmp_path
):
    (image_folder / "train" / "horse").rename(image_folder / "unlabeled" / "horse")
    run = python(SCRIPT, *PAPER, "--data-dir", image_folder, "--picks-per-class", "4")
    assert run.returncode != 0 and "train needs folders horse and bird" in run.stderr.splitlines()[-1]
    assert not (tmp_path / "checkpoints").exists()
