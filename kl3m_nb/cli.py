"""The command line: `python -m kl3m_nb {demo, run, train, stack, estimate, spectra, report, export,
runs}`.

Bad input ends with one sentence on standard error and exit code 2, before anything runs or is
written. What works on notebooks and pages is imported by the commands that need it: it takes
seconds, which every process under torchrun would wait.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from kl3m_nb import profiles
from kl3m_nb.common import distributed, paths, values
from kl3m_nb.common.files import why
from kl3m_nb.common.stopping import EXIT_INTERRUPTED
from kl3m_nb.common.text import time_left
from kl3m_nb.growth.stacking import ORDERS, stack_checkpoint, verify_stack
from kl3m_nb.model import decoder
from kl3m_nb.model.estimate import GPUS, estimate
from kl3m_nb.model.runtime import device_memory
from kl3m_nb.profiles import warmup_remark
from kl3m_nb.runs import export, registry
from kl3m_nb.runs.checkpoints import (
    CheckpointFailed,
    check_sound,
    checkpoint_step,
    latest_checkpoint,
)
from kl3m_nb.runs.folder import MICRO_BATCHES, RUN_FILE, read_run_init, read_run_profile
from kl3m_nb.runs.lineage import carried_counts
from kl3m_nb.runs.summary import describe_run
from kl3m_nb.training.loop import TrainingStopped, train

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


EXIT_REFUSED = 2


# The notebooks that train, and what their configuration calls the run's folder.
_TRAINED_IN = {
    "00_source_model": "run_dir",
    "02_training": "run_dir",
    "05_growth_comparison": "scratch_dir",
}


LONG_WITHOUT_GPU = 6 * 3600  # seconds; a longer job on a CPU is rarely meant


class Refused(ValueError):
    """A command that was given something it cannot work with."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the process's exit code."""
    options = _parser().parse_args(arguments)
    show = warnings.showwarning
    warnings.showwarning = _show_warning
    try:
        _check_launcher(options.name)
        return options.command(options)
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        print(f"kl3m_nb: {_sentence(error)}", file=sys.stderr)
        return EXIT_REFUSED
    except (
        TrainingStopped,
        CheckpointFailed,
        OSError,
    ) as error:  # an OSError: a full disk, a folder that takes no file
        print(f"kl3m_nb: {_sentence(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if distributed.torchrun_rank() == 0:
            print("Interrupted; the same command continues where it stopped.", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        warnings.showwarning = show


def _sentence(error: Exception) -> str:
    return why(error) if isinstance(error, OSError) else str(error)


def _check_launcher(command: str) -> None:
    """Refuses several processes that do not share out the work: each would do all of it, over the
    files of the others.
    """
    processes = os.environ.get("WORLD_SIZE") or "1"
    if processes == "1":
        return
    if distributed.is_under_torchrun() and command != "train":
        raise Refused(
            f"torchrun has started {command} {processes} times; only train shares out its work, so"
            f" start {command} by itself."
        )
    if command == "train" and not distributed.is_under_torchrun():
        raise Refused(
            f"WORLD_SIZE is {processes}, but torchrun has not started this process, which would"
            " train alone; start torchrun once on each machine, or unset WORLD_SIZE."
        )


def _show_warning(message: Warning | str, *_) -> None:
    """A warning in one line, without the line of source that Python shows."""
    print(f"kl3m_nb: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kl3m_nb", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="name")

    command = commands.add_parser(
        "demo", help="run notebooks 00-05 at laptop size and write an HTML index"
    )
    command.add_argument(
        "--fresh", action="store_true", help="remove the runs of an earlier demonstration first"
    )
    command.set_defaults(command=_demo)

    command = commands.add_parser("run", help="run one notebook headless, with checked parameters")
    command.add_argument(
        "notebook", help="a path, or the name of one in notebooks/, such as 02_training"
    )
    command.add_argument(
        "-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE")
    )
    command.add_argument(
        "-f",
        "--file",
        type=Path,
        metavar="PARAMS.YAML",
        help="parameters from a YAML file; -p wins over it",
    )
    command.add_argument(
        "-o",
        "--output",
        type=Path,
        help=(
            "the executed notebook, or a folder for it that is there (default: in the run's folder)"
        ),
    )
    command.add_argument(
        "--without-gpu",
        action="store_true",
        help="start even a long job on a machine without a GPU",
    )
    command.set_defaults(command=_run)

    command = commands.add_parser("train", help="train a profile without a notebook")
    command.add_argument(
        "profile",
        nargs="?",
        default="",
        help=(
            f"one of {', '.join(profiles.PROFILES)}, or a run to go on with, "
            "as a path such as runs/x"
        ),
    )
    command.add_argument(
        "--run",
        "--run-dir",
        default="",
        help=(
            "folder below runs/, or a path (default: named after the "
            "profile); behind torchrun write --run-dir, as Python 3.11 takes --run for torchrun's"
        ),
    )
    command.add_argument(
        "--init",
        help=(
            "checkpoint folder, seen from here or from the project's root, or hub id to start from"
            " (default: random weights)"
        ),
    )
    command.add_argument(
        "--set",
        nargs=2,
        action="append",
        default=[],
        metavar=("FIELD", "VALUE"),
        help="a profile field",
    )
    command.add_argument(
        "--without-gpu",
        action="store_true",
        help="start even a long job on a machine without a GPU",
    )
    command.set_defaults(command=_train)

    command = commands.add_parser("stack", help="grow a checkpoint in depth")
    command.add_argument("source")
    command.add_argument("target")
    command.add_argument("--factor", type=int, default=4)
    command.add_argument(
        "--order", default="cyclic", help=f"one of {', '.join(ORDERS)} (default: cyclic)"
    )
    command.add_argument(
        "--noise",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="noise in the copied matrices, such as 0.2",
    )
    command.add_argument("--seed", type=int, default=0, help="of noise and random blocks")
    command.set_defaults(command=_stack)

    command = commands.add_parser(
        "estimate", help="memory and time of a profile, before it is started"
    )
    command.add_argument("profile", help=f"one of {', '.join(profiles.PROFILES)}")
    command.add_argument(
        "--gpu", default="", help=f"one of {', '.join(GPUS)} (default: this machine)"
    )
    command.add_argument(
        "--init",
        help="checkpoint folder that training starts from (default: a model as the profile says)",
    )
    command.add_argument(
        "--micro-batch", type=int, help="windows that go through the model at once"
    )
    command.add_argument(
        "--set",
        nargs=2,
        action="append",
        default=[],
        metavar=("FIELD", "VALUE"),
        help="a profile field",
    )
    command.set_defaults(command=_estimate)

    command = commands.add_parser(
        "spectra", help="run notebook 03 on a checkpoint and write its page, figures and tables"
    )
    command.add_argument(
        "checkpoint",
        help="a run folder, a checkpoint folder, a .safetensors file or a hub id OWNER/NAME",
    )
    command.add_argument(
        "--against",
        default="",
        help="the stack at step 0 or the source (default: what the run names)",
    )
    command.add_argument(
        "--source-layers",
        type=int,
        default=0,
        help="depth of the source (default: as the run or stack says)",
    )
    command.add_argument(
        "--windows",
        type=int,
        default=0,
        help="held-out windows for CKA and swapped copies (default: 0)",
    )
    command.add_argument(
        "--top-k",
        type=int,
        default=16,
        help="size of the subspaces that are compared (default: 16)",
    )
    command.add_argument(
        "--no-alpha", action="store_true", help="do not fit power laws to the tails"
    )
    command.add_argument(
        "-o", "--output", type=Path, help="folder of the report (default: runs/NAME-spectra)"
    )
    command.set_defaults(command=_spectra)

    command = commands.add_parser(
        "report", help="write a run's curves, clamps and settings as one HTML page"
    )
    command.add_argument(
        "run", help="a run folder, or its name below runs/; it may still be training"
    )
    command.set_defaults(command=_report)

    command = commands.add_parser(
        "export",
        help="copy a checkpoint as a model under a name of its own, without training state",
    )
    command.add_argument("checkpoint")
    command.add_argument("folder", help="where the model's folder is made")
    command.add_argument(
        "--name",
        help=(
            "what folder, card and repository call the model, with the -stepN that it has (default:"
            " the family's name, as in the checkpoint's card)"
        ),
    )
    command.add_argument(
        "--push-to-hub",
        metavar="OWNER",
        help="also upload it, as a private repository of OWNER that holds no model yet",
    )
    command.set_defaults(command=_export)

    command = commands.add_parser("runs", help="a table of all runs")
    command.set_defaults(command=_runs)
    return parser


def _demo(options: argparse.Namespace) -> int:
    from kl3m_nb.jupyter.demo import run_demo

    return run_demo(fresh=options.fresh)


def _run(options: argparse.Namespace) -> int:
    from kl3m_nb.jupyter.parameters import check_parameters, find_notebook
    from kl3m_nb.jupyter.runner import configuration, run_notebook

    notebook = find_notebook(options.notebook)
    given = (values.read_mapping(options.file) if options.file else {}) | dict(options.parameter)
    checked = check_parameters(notebook, given)
    asked = configuration(notebook, checked)
    trained_in = asked.get(_TRAINED_IN.get(notebook.stem, ""))
    if trained_in and asked.get("train_scratch", True):
        profile, start = asked["settings"], asked.get("start")
        if remark := warmup_remark(profile.schedule):
            warnings.warn(remark, stacklevel=1)
        lower = "scratch_steps" if "scratch_steps" in asked else "max_steps, seq_len or micro_batch"
        _require_gpu_or_consent(trained_in, profile, options.without_gpu, start, lower)
    folder = asked.get("run_dir", Path.cwd()) / "notebooks"
    return run_notebook(notebook, options.output or folder / notebook.name, checked)


def _set_fields(options: argparse.Namespace) -> profiles.Profile:
    return profiles.override_profile(profiles.get_profile(options.profile), **_changes(options))


def _changes(options: argparse.Namespace) -> dict:
    changes = {}
    for key, text in options.set:
        kind = profiles.FIELD_TYPES.get(
            key, str
        ).__name__  # of an unknown field the profile says what is wrong
        try:
            changes[key] = values.cast(kind, text)
        except (ValueError, OverflowError) as error:
            raise Refused(
                f"The profile field {key!r} is of type {kind}; {text!r} is not{error}."
            ) from None
    return changes


def _require_gpu_or_consent(
    run_dir: Path,
    profile: profiles.Profile,
    consent: bool,
    init: str | None = None,
    lower: str = "max_steps, seq_len or micro_batch",
) -> None:
    if torch.cuda.is_available():
        return
    newest = latest_checkpoint(run_dir)
    done = checkpoint_step(newest) if newest else carried_counts(init).step
    if done >= profile.schedule.max_steps:
        return
    remaining = profiles.override_profile(profile, max_steps=profile.schedule.max_steps - done)
    needed = estimate(decoder.profile_of_start(remaining, init))
    memory = device_memory(torch.device("cpu"))
    if needed.seconds < LONG_WITHOUT_GPU and needed.memory < memory:
        return
    if not consent:
        raise Refused(
            f"{needed.sentence()}, which has no GPU and {memory / 2**30:.0f} GiB of memory; "
            f"lower {lower}, or add --without-gpu to start all the same."
        )
    if distributed.torchrun_rank() == 0:
        print(f"{needed.sentence()}; starting, as asked.", flush=True)


def _run_folder(name: str, profile: str = "") -> Path:
    """A bare name lies below runs/, anything with a slash is a path from here."""
    return Path.cwd() / name if os.sep in name else registry.run_path(profile, "train", name)


def _what_to_train(options: argparse.Namespace) -> tuple[profiles.Profile, Path, str | None]:
    """Profile, folder and start: of a new run, or of one that was begun before or prepared by a
    notebook.
    """
    if options.profile and os.sep not in options.profile:
        profile, folder = _set_fields(options), _run_folder(options.run, options.profile)
        return profile, folder, _start(options.init, folder)
    name = options.profile or options.run
    if not name:
        raise Refused(
            "train was given neither a profile nor a run; name a profile, or the folder of a run to"
            " go on with."
        )
    if options.init or (options.profile and options.run):
        raise Refused(
            f"train goes on with the run {name}, which keeps its folder and its start; leave out"
            " --init and --run."
        )
    folder, changes = _run_folder(name), _changes(options)
    for key in changes:
        if profiles.FIELD_SECTIONS.get(key, "runtime") != "runtime" and key not in MICRO_BATCHES:
            raise Refused(
                f"train goes on with the run {name}, whose {key} stays as it is; --set takes"
                " runtime settings here, and micro_batch and grad_accumulation while their product"
                " stays."
            )
    profile, init = read_run_profile(folder), read_run_init(folder)
    start = paths.recorded_place(init).name if init else None
    return profiles.override_profile(profile, **changes), folder, start


def _start(name: str | None, run_dir: Path) -> str | None:
    """The checkpoint folder, or hub id, to start from.

    A run that has begun goes on without what it was started from; only a new one needs it.
    """
    if not name:
        return None
    place = paths.checkpoint_place(name)
    if place.kind != "nothing":
        return place.name
    if not (run_dir / RUN_FILE).exists():
        raise Refused(paths.no_checkpoint(name))
    return os.path.abspath(name)


@distributed.reports_errors
def _train(options: argparse.Namespace) -> int:
    talks = distributed.torchrun_rank() == 0
    if not talks:
        logging.getLogger("kl3m_nb").setLevel(
            logging.ERROR
        )  # all read the same rows, one says what it leaves out
    began = printed = first_step = 0

    def prepare() -> tuple[profiles.Profile, Path, str | None]:
        profile, folder, init = _what_to_train(options)
        _require_gpu_or_consent(folder, profile, options.without_gpu, init)
        return profile, folder, init

    def report(row) -> None:
        nonlocal began, printed, first_step
        if row["kind"] == "start":
            began, first_step = time.monotonic(), row["step"]
        elif row["kind"] == "held_out":
            print(f"step {row['step']:,}: held-out loss {row['held_out_loss']:.4f}", flush=True)
        elif row["kind"] == "train" and row["skipped"]:
            print(f"step {row['step']:,}: not finite, so it changes nothing", flush=True)
        elif row["kind"] == "train" and row["seconds"] - printed >= 5:
            printed = row["seconds"]
            step, max_steps, seconds = (
                row["step"],
                profile.schedule.max_steps,
                time.monotonic() - began,
            )
            print(
                f"step {step:,}/{max_steps:,}: loss {row['cross_entropy']:.4f},"
                f" {row['tokens_per_second']:,.0f} tokens/s,"
                f" {time_left(seconds, step - first_step, max_steps - step)} left",
                flush=True,
            )

    with distributed.process_group():
        profile, folder, init = distributed.on_every_rank(prepare)
        result = train(profile, folder, init, callbacks=[report])
    if talks:
        print(
            f"Finished at step {result.step:,}, held-out loss {result.held_out_loss:.4f}; the model"
            f" is in {result.checkpoint}"
        )
    return 0


def _stack(options: argparse.Namespace) -> int:
    source, target = (
        Path.cwd() / paths.checkpoint_place(options.source).name,
        Path.cwd() / options.target,
    )
    check_sound(source)
    summary = stack_checkpoint(
        source, target, options.factor, options.order, options.noise, options.seed
    )
    compared = verify_stack(source, target)
    for key, value in summary.table().items():
        print(f"{key:12} {value}")
    print(f"{'verified':12} {compared} tensors, byte by byte")
    return 0


def _estimate(options: argparse.Namespace) -> int:
    if options.micro_batch is not None:
        options.set.append(("micro_batch", str(options.micro_batch)))
    start = paths.checkpoint_place(options.init) if options.init else None
    if start and not (config := start.path / "config.json").is_file():
        raise Refused(
            f"There is no {config} to take the numbers of the model from; name a checkpoint folder,"
            " or leave out --init."
        )
    table = estimate(
        decoder.profile_of_start(_set_fields(options), options.init), options.gpu
    ).table()
    for key, value in table.items():
        print(f"{key:{max(map(len, table))}}  {value}")
    return 0


def _export(options: argparse.Namespace) -> int:
    checkpoint = Path.cwd() / paths.checkpoint_place(options.checkpoint).name
    if options.push_to_hub:  # asked before gigabytes are copied
        export.free_repository(checkpoint, options.push_to_hub, options.name)
    model = export.export_model(checkpoint, Path.cwd() / options.folder, options.name)
    print(f"the model is in {model}")
    if options.push_to_hub:
        print(f"uploaded to {export.push_to_hub(model, options.push_to_hub)}")
    return 0


def _spectra(options: argparse.Namespace) -> int:
    from kl3m_nb.jupyter.parameters import find_notebook
    from kl3m_nb.spectra.matrices import local_checkpoint
    from kl3m_nb.spectra.subject import find_subject

    subject = find_subject(options.checkpoint, options.against, options.source_layers)
    if options.windows > 0 and not (subject.profile and subject.copies > 1):
        raise Refused(
            "CKA and swapped copies need the held-out windows of a run of a stacked model;"
            f" {subject.checkpoint} is not in one."
        )
    given = {
        "trained": options.checkpoint,
        "source_layers": options.source_layers,
        "role": "",
        "windows": options.windows,
        "top_k": options.top_k,
        "fit_alpha": not options.no_alpha,
    }
    if options.against:
        other = local_checkpoint(options.against)
        is_stack = subject.start and other.samefile(subject.start)
        given["stack" if is_stack else "source"] = options.against
    name = subject.name.replace(", ", "-").replace("/", "-")
    folder = Path.cwd() / (options.output or registry.run_path("", "", f"{name}-spectra"))
    notebook = find_notebook("03_spectral_analysis")
    return _page(notebook, folder / "spectra.ipynb", given | {"folder": str(folder)})


def _report(options: argparse.Namespace) -> int:
    run_dir = _run_folder(options.run)
    describe_run(run_dir)  # refuses what is no run before a kernel starts
    notebook = Path(__file__).parent / "jupyter" / "templates" / "run_report.ipynb"
    return _page(notebook, run_dir / "report.ipynb", {"run_folder": str(run_dir)})


def _page(notebook: Path, output: Path, given: dict) -> int:
    """Runs a notebook whose HTML page is what was asked for, and says where that is."""
    from kl3m_nb.jupyter.parameters import check_parameters
    from kl3m_nb.jupyter.runner import configuration, run_notebook

    checked = check_parameters(notebook, given)
    configuration(notebook, checked)
    exit_code = run_notebook(notebook, output, checked)
    if exit_code == 0:
        print(f"The report: {output.with_suffix('.html')}")
    return exit_code


def _runs(options: argparse.Namespace) -> int:
    table = registry.load_runs()
    if table.empty:
        print(f"There is no run to show in {paths.runs_dir()}; `make demo` makes some.")
        return 0
    shown = {
        "held_out_loss": "{:.3f}".format,
        "tokens": "{:,.0f}".format,
        "seconds": "{:,.0f}".format,
    }
    print(table.drop(columns="checkpoint").to_string(index=False, formatters=shown, na_rep="–"))
    print(f"in {paths.runs_dir()}")
    return 0
