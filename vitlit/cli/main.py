"""The command line: `vitlit ...`."""

import gc
import os
import re
import signal
import sys
from difflib import get_close_matches
from importlib import import_module

import vitlit
from vitlit.errors import UserError

HELP = f"""\
vitlit {vitlit.__version__}: pretrain and finetune Vision Transformers

  vitlit fit --config CONFIG [--KEY VALUE ...]      train; the same command again continues an unfinished run
  vitlit validate|test RUN [--KEY VALUE ...]        evaluate a run's best checkpoint on its val or test split
  vitlit predict RUN PHOTOS... --out FILE.csv       classify images: files, or folders searched to their depth
  vitlit data NAME OUT                              write a data set as an image folder; digits works offline
  vitlit data check ROOT                            find what is wrong with a folder before training does
  vitlit data shard ROOT OUT                        pack it into tars that are read from disk, S3, GCS or HTTP
  vitlit data show RUN --step N                     which images a step of a run was trained on
  vitlit data imagenet TARS OUT                     unpack ILSVRC 2012
  vitlit benchmark data ROOT                        which stage of loading is slowest, and what a ViT would need
  vitlit benchmark model [--preset B/16]            how fast this machine trains a ViT, and its largest batch
  vitlit doctor [--json]                            report on this machine, and what to fix on it
  vitlit weights show FILE                          what is in a weight file: timm, transformers, torchvision, npz, ...
  vitlit weights convert FILE OUT --format FORMAT   write it for another tool, and compare the outputs
  vitlit evaluate WEIGHTS... --root ROOT            what weights are worth on a folder, and how sure that is
  vitlit export WEIGHTS OUT.onnx|OUT.pt2|OUT_DIR    ONNX, torch.export, transformers, checked against the ViT
  vitlit push RUN OWNER/NAME --license NAME         publish a run on the Hugging Face hub, with a model card
  vitlit predict FILE.onnx PHOTOS... --out FILE.csv by such a file, with onnxruntime
  vitlit embed WEIGHTS ROOT OUT.parquet|.npz        features as a table; --neighbours K finds copies and wrong labels
  vitlit inspect WEIGHTS IMAGE... --out DIR         draw what a ViT attends to, and what it has learned
  vitlit tune --config C --root ROOT --budget 2h    search how much of the weights to train, and at which rate
  vitlit runs [ROOT]                                list runs: state, best metric, time, the settings that differ
  vitlit runs compare RUN RUN ... [--out FILE.html] their settings, numbers and curves side by side, seeds together
  vitlit report RUN                                 one HTML page of a run, which `fit` writes at its end too
  vitlit config [NAME]                              print a shipped config or cluster script, or list them

validate, test and predict take --config CONFIG in RUN's place. What a command is told to write must not exist yet.

  vitlit fit --help                     every key
  vitlit fit --model.help Finetune      the keys of a stage: Pretrain, Finetune
  vitlit fit --config CONFIG --print_config=skip_default

VITLIT_DEBUG=1 shows the traceback of an error. VITLIT_TRUST=PACKAGE,... lets a config name classes of your own, which
may be in the current folder.
"""

LIGHTNING = ("MisconfigurationException", "TrainingSpikeException")  # its errors that are one line
# What is data.root elsewhere: messages about data are worded for training.
ROOTS = {"evaluate": "--root", "export": "--root", "tune": "--root", "embed": "ROOT", "benchmark": "ROOT"}
STAGES = ("fit", "validate", "test", "predict")
# The modules whose `run` is each other command, imported when it is asked for.
COMMANDS = {
    "data check": "vitlit.prepare.check",
    "data shard": "vitlit.prepare.shard",
    "data show": "vitlit.prepare.show",
    "data imagenet": "vitlit.prepare.imagenet",
    "data": "vitlit.prepare.sources",
    "benchmark data": "vitlit.benchmark.data",
    "benchmark model": "vitlit.benchmark.model",
    "doctor": "vitlit.doctor",
    "config": "vitlit.cli.configs",
    "weights": "vitlit.cli.weights",
    "evaluate": "vitlit.cli.evaluate",
    "export": "vitlit.cli.export",
    "push": "vitlit.cli.push",
    "embed": "vitlit.cli.embed",
    "inspect": "vitlit.cli.inspect",
    "tune": "vitlit.cli.tune",
    "runs": "vitlit.cli.runs",
    "report": "vitlit.cli.report",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for a user's mistake, 128 + a signal (141 after `| head`)."""
    try:
        try:
            return run_command(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it exits
            return 141
        raise  # another pipe, such as W&B's or a data worker's, is a bug to show
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # of rich, which has done the same
            return 141
        raise


def run_command(argv: list[str]) -> int:
    if argv[:1] in ([], ["-h"], ["--help"], ["help"]) or set(argv[:2]) <= {"-h", "--help", "benchmark"}:
        print(HELP, end="")
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"vitlit {vitlit.__version__}")
        return 0
    try:
        return dispatch(argv)
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning exits with 1 on Ctrl-C, and with 0 on a SIGTERM during evaluation.
        if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
            return 130
        if type(stop).__name__ == "SIGTERMException":
            return 143
        raise
    except Exception as error:
        message = explain(error)
        if message and (root := ROOTS.get(argv[0])):
            message = re.sub(r"(--)?data\.root\b", root, message)
            message = re.sub(r"(--)?data\.(holdout|manifest)\b", r"--\2", message)
        if message is None or os.environ.get("VITLIT_DEBUG") == "1":
            raise
        print(f"vitlit: error: {message}", file=sys.stderr)
        return 2


def dispatch(argv: list[str]) -> int:
    command, arguments = argv[0], argv[1:]
    if command == "predict" and any(argument.endswith(".onnx") for argument in arguments):
        return int(import_module("vitlit.cli.predict").run(arguments))
    if command in STAGES:
        # OpenMP threads that spin while they wait take the cores from data workers: a step takes ten times as long.
        # Torch reads this when it is imported.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        # A signal that arrives during the imports waits until `interrupt.signals_handled`.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
        gc.disable()  # collections amid a million new objects take a fifth of the imports' time
        fit = import_module("vitlit.cli.fit")
        gc.enable()
        return int(fit.run(command, arguments))
    for words in (2, 1):
        if module := COMMANDS.get(" ".join(argv[:words])):
            return int(import_module(module).run(argv[words:]))
    near = get_close_matches(command, [*STAGES, *COMMANDS], 1)
    hint = f"did you mean {near[0]}?" if near else "vitlit --help lists them"
    raise UserError(f"no command {command!r}; {hint}")


def explain(error: BaseException) -> str | None:
    """The message of a user's mistake, wherever it is in the chain of causes; None for a bug."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, UserError) or type(seen).__name__ in LIGHTNING:
            # A data worker passes on its whole traceback as text.
            return " ".join(str(seen).rsplit("UserError: ", 1)[-1].split())
        seen = seen.__cause__ or seen.__context__
    return None
