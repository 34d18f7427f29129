"""The command line. Arguments are read, and config errors told, before anything heavy is imported."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from stgen import config, schema
from stgen.lab import study as studies
from stgen.logger import DISK


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells each option's default, but for those that have none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> None:
    """The console script: `stgen train ...` and the other doors."""
    doors = {
        "train": (train, "train on a folder of videos"),
        "launch": (launch, "train on several GPUs or nodes"),
        "sample": (sample, "sample clips from a run"),
        "ablate": (ablate, "train the cells of a study, compare them and write the report"),
        "report": (report, "measure runs and compare them on a page"),
        "inspect": (inspect, "draw the attention of a config, and measure that of a run"),
        "quantise": (quantise, "measure what low bits cost the attention of runs, and compare them"),
        "bench": (bench, "measure the attention of a config on this machine"),
        "data": (data, "look at a folder of videos, encode it once, or render the built-in one"),
        "export": (export, "write a run as a diffusers folder with a model card, and perhaps push it to the hub"),
        "doctor": (doctor, "whether training can run here, and which kernels work"),
        "probe": (probe, "train one attention layer of each normaliser to recall, and compare them"),
    }
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: stgen {{{','.join(doors)}}} ...\n")
        print("\n".join(f"  {name:<9}{meaning}" for name, (_, meaning) in doors.items()))
        print("\n`stgen train --help` and the like tell the rest.")
        sys.exit(0 if argv else 2)
    if argv[0] not in doors:
        sys.exit(_say(f"stgen: no command {argv[0]!r}; there are {', '.join(doors)}"))
    doors[argv[0]][0](argv[1:])


def train(argv: Sequence[str] | None = None) -> None:
    """`train.py CONFIG [key=value ...]`."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a video diffusion transformer as a config says.",
        epilog="Keys of a config, each of which may be overridden as key=value:\n\n" + config.help_text(schema.Config),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="a YAML file, such as configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace those of the file")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and what it costs, then stop")
    args = parser.parse_intermixed_args(argv)
    cfg = _config(args.config, args.overrides)
    if os.environ.get("RANK", "0") != "0":
        os.environ["TQDM_DISABLE"] = (
            "1"  # read when tqdm is first imported: of all ranks of torchrun the first shows its bars
        )
    if (
        "RANK" in os.environ
    ):  # read with torch: else DDP warns on each rank that it looked for unused weights and found none
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if args.dry_run:
        print(config.dump(cfg))
    with _told():
        if args.dry_run:
            from stgen.describe import dry_run
            from stgen.source import known_captions

            print(dry_run(cfg, known_captions(cfg)))
        else:
            from stgen import ranks
            from stgen.train import train as run

            summary = run(cfg)
            code = 128 + signal.Signals[summary["stopped"]] if "stopped" in summary else 0
            ranks.leave(code) if ranks.started() else sys.exit(code)


def launch(argv: Sequence[str] | None = None) -> None:
    """`stgen launch CONFIG --gpus-per-node G [key=value ...]`."""
    parser = argparse.ArgumentParser(
        prog="stgen launch",
        description="Train a config on several GPUs: starts torchrun on this machine, or with --dry-run prints its line and a "
        "SLURM script for any number of nodes. train.train_batch_size is the batch of all together, so that the curve stays the "
        "same on any number of GPUs; keys of the section distributed say how the model lies on them.",
    )
    add = parser.add_argument
    add("config", type=Path, help="a YAML file, such as configs/quickstart.yaml")
    add("overrides", nargs="*", metavar="key=value", help="values that replace those of the file")
    add("--nodes", type=_count, default=1, help="machines (default: 1, this one)")
    add("--gpus-per-node", "--gpus_per_node", type=_count, required=True, metavar="G", help="processes on each, one a GPU; with "
        "run.device=cpu processes on CPUs")  # fmt: skip
    add("--dry-run", action="store_true", help="print the command and the SLURM script, then stop")
    args = parser.parse_intermixed_args(argv)
    cfg = _config(args.config, args.overrides)
    with _told():
        from stgen.lab.launch import launch as run

        run(cfg, args.config, args.overrides, args.nodes, args.gpus_per_node, args.dry_run)


def sample(argv: Sequence[str] | None = None) -> None:
    """`sample.py RUN --prompt ...`."""
    parser = argparse.ArgumentParser(
        prog="sample.py",
        description="Sample clips from a trained run. Each clip is written as {index:03d}-seed{seed} with a JSON file "
        "beside it that holds its prompt and settings.",
        formatter_class=_Help,
    )
    add = parser.add_argument
    add("run", type=Path, help="a run folder, one of its checkpoint folders, or a saved pipeline")
    add("--prompt", nargs="+", action="extend", metavar="TEXT", help="one prompt or several")
    add("--prompt_file", type=Path, help="prompts from a .txt (one a line, # comments), .csv or .jsonl file; in the "
        "latter any of the options below may be a column")  # fmt: skip
    add("--negative_prompt", default="", help="what guidance leads away from")
    add("--image", type=Path, help="an image that the clips begin with, for models trained with objective.frame_times past or "
        "frame; it stays still for as many frames as the codec joins")  # fmt: skip
    add("--guidance_scale", type=float, help="classifier-free guidance; 1 or less switches it off (default: the run's)")
    add("--num_inference_steps", type=int, help="steps of the scheduler (default: the run's)")
    add("--scheduler", choices=dict.fromkeys(sum(schema.SAMPLERS.values(), ())), help="sampler (default: the run's)")
    add(
        "--seed", type=int, nargs="+", default=[0], help="seed of the first clip, or one seed for each clip of a prompt"
    )
    add("--num_videos_per_prompt", type=int, default=1, help="clips of each prompt, with seeds counting on")
    add("--num_frames", type=int, help="frames of a clip (default: as trained); longer ones are made and written chunk by "
        "chunk by models with a memory over time")  # fmt: skip
    add("--chunk_frames", type=_count, help="frames of such a chunk (default: what suits the model)")
    add("--height", type=int, help="height in pixels (default: as trained)")
    add("--width", type=int, help="width in pixels (default: as trained)")
    add("--fps", type=float, help="frames per second of the files (default: as trained)")
    add("--output", nargs="+", choices=("mp4", "gif", "frames", "sheet"), default=["mp4"], help="what to write: mp4, "
        "gif, a folder of PNG frames, one contact sheet of all clips")  # fmt: skip
    add("--output_dir", type=Path, help="where to write (default: RUN/samples)")
    add("--batch_size", type=int, help="clips computed at once (default: 8; under torchrun fewer where a rank would "
        "be idle)")  # fmt: skip
    add("--lora", type=Path, metavar="PATH", help="an adapter to add to the weights: the run folder of a training with "
        "lora.rank, its pytorch_lora_weights.safetensors, or a hub id")  # fmt: skip
    add("--lora_scale", type=float, default=1.0, help="how much of it; 0 is none")
    add("--offload", choices=("none", "model", "group", "sequential"), default="none", help="keep parts out of a GPU's memory "
        "while they are not needed: whole parts, or layer by layer (slower, least memory)")  # fmt: skip
    add("--vae_tiling", action="store_true", help="decode tile by tile, in less memory; for autoencoders that can")
    add("--cache", nargs="+", metavar=("KIND", "NAME=VALUE"), help="reuse over denoising steps: first_block (threshold), mag "
        "(threshold, max_skip, start), taylorseer (every, start, order), pab (spatial, temporal, cross, from, to), or support "
        "(every: which keys are attended is chosen anew only so often); faster, not the same clips, and first_block and mag "
        "decide for a batch as a whole")  # fmt: skip
    _add_run_options(add)
    args = parser.parse_args(argv)
    if not args.prompt and args.prompt_file is None:
        parser.error("give --prompt or --prompt_file")
    if os.environ.get("RANK", "0") != "0":
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is first imported: the first rank shows its bar
    with _told():
        from stgen.requests import check_early

        check_early(args)  # before torch is imported
        from stgen import ranks
        from stgen.sample import sample as run

        run(args)
        if ranks.started():
            ranks.leave(0)


def ablate(argv: Sequence[str] | None = None) -> None:
    """`stgen ablate STUDY [key=value ...]`."""
    parser = argparse.ArgumentParser(
        prog="stgen ablate",
        description="Train every cell of a study with every seed, measure the runs, compare the cells with their base and "
        "write a report. First the plan is printed: what each cell costs and how long it takes. Start the same command "
        "again after a kill, a failure or a change of mind: what is done is not run again, and no number changes.",
        epilog="Keys of a study:\n\n" + config.help_text(studies.Study),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("study", type=Path, help="a YAML file, such as configs/ablations/factorisation.yaml")
    add("overrides", nargs="*", metavar="key=value", help="keys of the study (steps=50) or of every cell's config")
    add("--dry-run", action="store_true", help="print the plan, then stop; nothing is written")
    add("--report", action="store_true", help="run nothing; write the report anew from what is there")
    add("--only", nargs="+", action="extend", default=[], metavar="NAME", help="run these cells alone")
    add("--output_dir", type=Path, help="where everything goes (default: runs/ablations/STUDY)")
    add("--jobs", type=_count, default=1, help="runs at once (default: 1, or one a device)")
    add("--devices", nargs="+", default=[], metavar="N", help="CUDA devices that runs are given in turn, such as 0 1")
    add("--threads", type=_count, help="threads of a run (default: the cores shared by the jobs)")
    add("--launcher", metavar="TEMPLATE", help="command line that starts a run, such as 'srun --gpus=1 {command}'; waits "
        "for it to end; {name} names the run")  # fmt: skip
    args = parser.parse_intermixed_args(argv)
    with _told():
        try:
            _ablate(args)
        except config.ConfigError as error:
            _refuse(error)
        except studies.StudyError as error:
            sys.exit(_say(f"study error: {error}"))


def _ablate(args: argparse.Namespace) -> None:
    study, cells = studies.read(args.study, args.overrides), studies.load(args.study, args.overrides)
    if unknown := [name for name in args.only if name not in [cell.name for cell in cells]]:
        raise studies.StudyError(f"--only: {args.study} has no cell {unknown[0]!r}")
    from stgen.lab import ablate as lab
    from stgen.lab.plan import Options

    folder = args.output_dir or Path("runs", "ablations", args.study.stem)
    options = Options(folder, args.jobs, args.devices, args.threads, args.launcher, args.only, args.overrides)
    if args.report:
        lab.retell(args.study, folder)
    elif args.dry_run:
        lab.planned(args.study, study, cells, options)
    else:
        sys.exit(lab.ablate(args.study, study, cells, options))


def report(argv: Sequence[str] | None = None) -> None:
    """`stgen report RUN [RUN ...]`."""
    parser = argparse.ArgumentParser(
        prog="stgen report",
        description="Compare existing runs on a page: held-out loss by noise level, prompts right, distances of sampled to real "
        "clips, flicker, copies of training clips, cost and attention, with paired differences to the first run and their "
        "intervals, plots, clips side by side and masks (report.html, report.md, results.csv, results.jsonl, plots/). Runs "
        "that differ in nothing but the seed are one cell. What is measured is kept in RUN/measures.json; a run takes about a "
        "minute on a CPU, most of it for sampling.",
        formatter_class=_Help,
    )
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="run folders; the first is what the others are compared with")
    add("--output_dir", type=Path, help="where to write (default: report in the first run's folder)")
    add("--features", default="random", help="what Fréchet distance and MMD are computed on: random (a fixed random network), "
        "codec (the run's latents), a TorchScript file (.pt), i3d:FILE.pt (the published TorchScript of I3D; the number is "
        "then called FVD), or a video network of torchvision (r3d_18, mvit_v2_s, ...) as NAME or NAME:WEIGHTS")  # fmt: skip
    add("--kernel", choices=("rbf", "polynomial"), default="rbf", help="of the MMD")
    add("--samples", type=_count, default=64, help="clips to sample of each run; of built-in shapes so many of prompts seen "
        "and so many of held-out ones, unless the run's validation.judged_noises says otherwise")  # fmt: skip
    args = parser.parse_args(argv)
    with _told():
        from stgen.lab.measure import Protocol
        from stgen.lab.report_runs import report_runs

        protocol = Protocol(samples=args.samples, features=args.features, kernel=args.kernel)
        print(f"report: {report_runs(args.runs, args.output_dir or args.runs[0] / 'report', protocol)}")


def inspect(argv: Sequence[str] | None = None) -> None:
    """`stgen inspect CONFIG [key=value ...]` and `stgen inspect RUN`."""
    parser = argparse.ArgumentParser(
        prog="stgen inspect",
        description="Of a config: draw which tokens each layer may attend (plan.png) and print what it costs; nothing is "
        "trained, and a model of any size is only sketched. Of a run: draw and print the same, then measure on real clips "
        "what the heads attend, at several noise levels: entropy, distance in time and space, mass on sinks and registers, "
        "how alike the maps of layers and of times are (heads.png, similarity_layers.png, similarity_times.png, "
        "statistics.json), and suggest changes of the config that follow from the numbers.",
        formatter_class=_Help,
    )
    add = parser.add_argument
    add("target", type=Path, metavar="CONFIG|RUN", help="a YAML file; or a run folder, one of its checkpoint folders or "
        "its final pipeline")  # fmt: skip
    add("overrides", nargs="*", metavar="key=value", help="CONFIG: values that replace those of the file")
    add("--output_dir", type=Path, help="where to write (default: RUN/inspect; of a config, its run.output_dir with "
        "-inspect behind)")  # fmt: skip
    measured = parser.add_argument_group("of a run")
    add = measured.add_argument
    _add_clip_options(add)
    _add_run_options(add)
    args = parser.parse_intermixed_args(argv)
    if not args.target.exists():
        sys.exit(_say(f"error: {args.target} is neither a config file nor a run folder; there is no such path", 1))
    if args.target.is_dir():
        if args.overrides:
            parser.error(f"a run is inspected as it was trained; leave out {args.overrides[0]!r}")
        with _told():
            from stgen.lab.inspect import inspect_run

            inspect_run(args)
        return
    cfg = _config(args.target, args.overrides)
    with _told():
        from stgen.lab.inspect import inspect_config

        inspect_config(cfg, args.output_dir or cfg.output_dir.with_name(cfg.output_dir.name + "-inspect"))


def quantise(argv: Sequence[str] | None = None) -> None:
    """`stgen quantise RUN [RUN ...]`."""
    parser = argparse.ArgumentParser(
        prog="stgen quantise",
        description="What rounding the maps, queries, keys and values of trained attention to int8 and int4 costs, on real "
        "clips at several noise levels: the error of each part, of the heads' output and of the model's prediction, the share "
        "of true zeros, head by head; every run against the first. Writes quantisation.json and quantisation.png.",
        formatter_class=_Help,
    )
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="run folders, checkpoint folders or final pipelines")
    add("--output_dir", type=Path, help="where to write (default: quantisation in the first RUN)")
    _add_clip_options(add)
    _add_run_options(add)
    args = parser.parse_args(argv)
    with _told():
        from stgen.lab.quantisation import quantise as run

        run(args)


def bench(argv: Sequence[str] | None = None) -> None:
    """`stgen bench attention --config CONFIG [key=value ...]`."""
    parser = argparse.ArgumentParser(
        prog="stgen bench",
        description="At a run's own shapes and on this machine: what the attention of each mixer costs, forward and with "
        "backward, beside dense attention in its layout and over the whole clip; what share of a training step that "
        "saves; each implementation; and from what length on a mixer is the faster. Writes bench.json and bench.png. "
        "Ctrl-C keeps what is measured. Another device: run.device=cpu.",
        formatter_class=_Help,
    )
    add = parser.add_argument
    add("what", choices=("attention",), help="what to measure")
    add("overrides", nargs="*", metavar="key=value", help="values that replace those of the file")
    add("--config", type=Path, required=True, help="a YAML file, such as configs/quickstart.yaml")
    add("--output_dir", type=Path, help="where to write (default: the config's run.output_dir with -bench behind)")
    add("--repeats", type=_count, default=10, help="rounds that are counted")
    args = parser.parse_intermixed_args(argv)
    cfg = _config(args.config, args.overrides)
    with _told():
        from stgen.build import device_of
        from stgen.lab.bench import bench_attention

        out = args.output_dir or cfg.output_dir.with_name(cfg.output_dir.name + "-bench")
        bench_attention(cfg, device_of(cfg), out, args.repeats)


def data(argv: Sequence[str] | None = None) -> None:
    """`stgen data check|cache|shapes ...`."""
    from stgen.lab import data_cli  # argparse alone, no torch

    args = data_cli.parse(argv)
    cfg = _config(args.config, args.overrides) if data_cli.takes_config(args) else None
    with _told():
        sys.exit(data_cli.run(args, cfg))


def export(argv: Sequence[str] | None = None) -> None:
    """`stgen export RUN --output DIR`."""
    parser = argparse.ArgumentParser(
        prog="stgen export",
        description="Write a run as a folder of diffusers: the pipeline in safetensors and JSON, a model card (README.md) with "
        "config, data and metrics, and sample clips. VideoPipeline.from_pretrained and sample.py load it, from the hub too.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("run", type=Path, help="a run folder, one of its checkpoint folders, or a saved pipeline")
    add("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    add("--weights", choices=("ema", "raw"), default="ema", help="averaged or raw weights")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the transformer's and a text "
        "encoder's weights")  # fmt: skip
    add("--variant", help="a name within the names of the weight files, such as bf16")
    add("--lora", type=Path, metavar="PATH", help="an adapter to merge into the weights")
    add("--fold", action="store_true", help="fold batch norms and finished prepbn into the layers behind them")
    add("--self-describing", action="store_true", help="add pipeline.py, one line, so that plain "
        "DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True) works where stgen is installed")  # fmt: skip
    add("--push_to_hub", metavar="ORG/NAME", help="upload the folder to this model repository of the Hugging Face hub")
    add("--public", action="store_true", help="make a new repository public; it is private otherwise")
    args = parser.parse_args(argv)
    with _told():
        from stgen.export import export as run

        run(args)


def doctor(argv: Sequence[str] | None = None) -> None:
    """`stgen doctor`."""
    argparse.ArgumentParser(
        prog="stgen doctor",
        description="Whether training can run on this machine and which kernels do its work, a line each, with what to do "
        "where something is missing. Ends with 0 if training can run.",
    ).parse_args(argv)
    with _told():
        from stgen.lab.doctor import doctor as run

        sys.exit(0 if run().can_train else 1)


def probe(argv: Sequence[str] | None = None) -> None:
    """`stgen probe [--output_dir DIR]`."""
    parser = argparse.ArgumentParser(
        prog="stgen probe",
        description="Exact retrieval: one attention layer of each normaliser is trained to fetch one of many things it has "
        "seen, all else being equal. Prints a table of the share answered right by number of things, and writes "
        "probe.json and probe.png. A few minutes on a CPU.",
        formatter_class=_Help,
    )
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("runs/probe"), help="where to write")
    add("--steps", type=_count, nargs="+", default=[500], help="training steps; several show what is a matter of speed")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the spread is drawn over these")
    args = parser.parse_args(argv)
    with _told():
        from stgen.lab.probes import run

        run(args.output_dir, args.steps, args.seeds)


def _add_clip_options(add: Callable[..., Any]) -> None:
    add(
        "--clips",
        type=_count,
        default=4,
        help="clips to measure on: held-out ones of a run's data, else training clips",
    )
    add("--times", type=_count, default=5, help="noise levels of each clip, spread evenly over (0, 1)")
    add("--seed", type=int, default=0, help="chooses clips and noise")


def _add_run_options(add: Callable[..., Any]) -> None:
    add("--weights", choices=("ema", "raw"), default="ema", help="averaged or raw weights")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    add("--wandb", choices=("auto", "online", "offline", "disabled"), default="auto", help="W&B: auto is online with an "
        "API key, else offline")  # fmt: skip


def _count(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} should be at least 1")
    return number


def _config(path: Path, overrides: Sequence[str]) -> schema.Config:
    try:
        return config.load(path, overrides, schema.Config)
    except config.ConfigError as error:
        _refuse(error)


def _refuse(error: config.ConfigError) -> NoReturn:
    for line in error.errors if os.environ.get("LOCAL_RANK", "0") == "0" else ():  # all ranks of a machine say the same
        print(line if line.startswith("config error") else f"config error: {line}", file=sys.stderr)
    sys.exit(2)


class _told:
    """Within it an error that we foresaw ends the program in one line instead of a traceback."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, _) -> None:
        if isinstance(error, KeyboardInterrupt):
            sys.exit(_say("interrupted; what was saved before stays as it was", 130))
        if error is not None and kind.__module__.startswith("stgen.") and isinstance(error, Exception):
            sys.exit(_say(f"error: {error}", 1))
        if isinstance(error, OSError) and error.errno in DISK:
            sys.exit(_say(f"error: {error.filename or 'a file'}: {(error.strerror or str(error)).lower()}", 1))


def _say(line: str, code: int = 2) -> int:
    print(config.one_line(line), file=sys.stderr)  # it may repeat names and words from any folder
    return code
