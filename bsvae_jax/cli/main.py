"""The command line: the commands of `bsvae`. Parsing, help and overrides are tyro's."""

import dataclasses
import errno
import functools
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro

from bsvae_jax import config as configs
from bsvae_jax.config import Config
from bsvae_jax.distributed.preemption import Interrupted
from bsvae_jax.errors import BsvaeError, DivergenceError, UserError, check_count
from bsvae_jax.objective import Optimal
from bsvae_jax.sweeps.grid import Sweep, choose_priors, choose_variances, load_sweep

DATA = Literal["digits", "mnist", "arrays", "folder", "tfds"]
NETWORK = Literal["linear", "mlp", "residual", "spatial"]
DECODER_VARIANCE = Literal["constant", "optimal", "learned", "predicted"]
PRIOR = Literal["standard_normal", "mixture", "vamp", "flow"]
SHARED = Literal["example", "batch", "pixel"]
DRIVING = Literal["loop", "scan", "vmap"]
FITTED = Literal["gaussian", "mixture", "flow", "flow_matching"]

Run = Annotated[Path, tyro.conf.arg(name="workdir", metavar="WORKDIR")]


def _choose(
    config_file: tyro.conf.Positional[Path],
    data: DATA | None = None,
    network: NETWORK | None = None,
    decoder_variance: DECODER_VARIANCE | None = None,
    prior: PRIOR | None = None,
) -> Config:
    """The config file's config, with the kinds named on the command line in place of its own."""
    config = configs.load_config(config_file)
    chosen = {"data": data, "network": network, "decoder_variance": decoder_variance, "prior": prior}
    for field, name in chosen.items():
        if name is not None:
            kind = configs.CHOICES[field][name]
            if not isinstance(getattr(config, field), kind):
                config = dataclasses.replace(config, **{field: kind()})
    return config


def _choose_for_sweep(
    config_file: tyro.conf.Positional[Path], data: DATA | None = None, network: NETWORK | None = None
) -> Config:
    """As `_choose`, where `--decoder-variance` and `--prior` are lists."""
    return _choose(config_file, data, network)


def prepare(
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")],
    size: int | None = None,
    crop: int | None = None,
    channels: Literal[1, 3] | None = None,
    train_split: str = "train",
    test_split: str = "test",
    holdout: float = 0.1,
    holdout_seed: int = 0,
    data_dir: str | None = None,
    manual_dir: str | None = None,
    skip_corrupt: bool = False,
) -> None:
    """Decode a set of images once, into a memory map that training reads; bsvae train does the same by itself when needed.

    Prepared images are kept in $BSVAE_CACHE, or ~/.cache/bsvae_jax, and found again by everything that changes a pixel. An
    interrupted command continues when it is given again.

    Example: bsvae prepare celeb_a --manual-dir DOWNLOADS --crop 148 --size 64

    Args:
      source: A folder or .zip of images, or the TFDS name of a set: mnist, fashion_mnist, cifar10, celeb_a, lsun/CATEGORY, or
        any image set of TFDS's catalogue, for which TensorFlow must be installed.
      size: Make all images so many pixels wide and high: the shorter side is resized to it, and the centre kept.
      crop: First keep the square of so many pixels around the centre.
      channels: 1 makes all images grey, 3 colour.
      train_split: Split of the TFDS set to train on.
      test_split: Split of the TFDS set that is held out.
      holdout: Share of a folder's images held out, where it has no folder test.
      holdout_seed: Decides which.
      data_dir: TFDS data directory; its default if not given.
      manual_dir: Folder with the published files of a set, where they cannot be downloaded.
      skip_corrupt: Leave out images that cannot be decoded, and list them.
    """
    from bsvae_jax.data import sources
    from bsvae_jax.data.cache import prepared

    chosen: configs.Folder | configs.TFDS
    if Path(source).exists():
        kind = "folder"
        chosen = configs.Folder(source, holdout, holdout_seed, crop, size, channels)
    else:
        kind = "tfds"
        if source.endswith((".zip", "/")) or source.startswith((".", "/")):
            raise UserError(f"There is no folder or .zip {source!r}.")
        chosen = configs.TFDS(source, data_dir, manual_dir, train_split, test_split, crop, size, channels)
        sources.prepare_tfds(chosen)
    recipe = sources.recipe(chosen)
    images = prepared(recipe, skip_corrupt)
    print(f"{len(images.train):,} training and {len(images.test):,} test images {images.image_shape}: {recipe.folder()}")
    options = [
        f"--data.{field.name.replace('_', '-')} {getattr(chosen, field.name)}"
        for field in dataclasses.fields(chosen)
        if getattr(chosen, field.name) != field.default
    ]
    print(f"bsvae train CONFIG --data {kind} {' '.join(options)}")


def _choose_for_import(
    file: tyro.conf.Positional[Path],
    config_file: tyro.conf.Positional[Path],
    data: DATA | None = None,
    network: NETWORK | None = None,
    decoder_variance: DECODER_VARIANCE | None = None,
) -> Config:
    """As `_choose`, after the file to import."""
    return _choose(config_file, data, network, decoder_variance)


def _keep_compiled_programs() -> None:
    from bsvae_jax._io.files import cache_folder
    from bsvae_jax.distributed.mesh import keep_compiled_programs

    keep_compiled_programs(cache_folder() / "compiled")


def _train_command(default: Config) -> Callable[..., None]:
    """`bsvae train` with the fields of `default` as options; the kinds of its parts decide which options there are."""

    def train(
        config_file: tyro.conf.Positional[Path],
        config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands] = default,
        workdir: Path | None = None,
        data: DATA | None = None,
        network: NETWORK | None = None,
        decoder_variance: DECODER_VARIANCE | None = None,
        prior: PRIOR | None = None,
        distributed: bool = False,
        coordinator: str | None = None,
        processes: int | None = None,
        process: int | None = None,
    ) -> None:
        """Train the experiment of a config file; run it again to continue where it stopped.

        Leaves in the workdir: config.json, metrics.jsonl, TensorBoard events, checkpoints (the latest two and the best),
        the calibrated variance, evaluation.json and figures. Every field of the config is an option below, with the config
        file's value as its default. Terms are in nats per image.

        Example: bsvae train configs/digits.py --beta 4 --decoder-variance constant --decoder-variance.variance 0.1

        Args:
          config_file: A Python file with get_config(); configs/ holds ready ones.
          config: The experiment.
          workdir: Folder of this run; runs/NAME-OF-CONFIG if not given.
          data: Kind of data source to use instead of the config's.
          network: Kind of network to use instead of the config's.
          decoder_variance: Kind of decoder variance to use instead of the config's.
          prior: Kind of prior to use instead of the config's.
          distributed: This is one of several processes, of which SLURM, Open MPI, a Cloud TPU pod or GKE tells each its place.
          coordinator: Where nothing tells: HOST:PORT of process 0, the same for all of them.
          processes: With a coordinator, the number of processes.
          process: With a coordinator, which of them this one is, from 0.
        """
        from bsvae_jax.distributed import multihost
        from bsvae_jax.evaluation import figures as pictures
        from bsvae_jax.evaluation import metrics
        from bsvae_jax.training.restore import restore
        from bsvae_jax.training.trainer import fit

        if distributed or coordinator is not None or processes is not None or process is not None:
            multihost.join(coordinator, processes, process)
        _keep_compiled_programs()
        folder = Path("runs") / config_file.stem if workdir is None else workdir
        result = fit(config, folder)
        if not multihost.is_writer():
            return
        print(metrics.as_table(result.report))
        if (sentence := metrics.left_out(result.images)) is not None:
            print(sentence)
        pictures.draw(restore(folder), result.images, folder)
        print(f"figures: {folder / 'figures'}")

    return train


def _import_command(default: Config) -> Callable[..., None]:
    """`bsvae import-torch` with the fields of `default` as options."""

    def import_torch(
        file: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FILE")]],
        config_file: tyro.conf.Positional[Path],
        config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands] = default,
        workdir: Path | None = None,
        data: DATA | None = None,
        network: NETWORK | None = None,
        decoder_variance: DECODER_VARIANCE | None = None,
    ) -> None:
        """Make a run of weights of the paper's PyTorch network, for bsvae evaluate, sample, export, or train to go on.

        The config must be of the network the file was saved from; its data decide the size of the images. Every field of it is
        an option below. PyTorch is not needed, and nothing in the file is run.

        Example: bsvae import-torch model_49.pt configs/mnist_paper.py --beta 10 --workdir runs/published

        Args:
          file: What torch.save(model.state_dict(), FILE) wrote.
          config_file: A Python file with get_config(); configs/mnist_paper.py and configs/celeba_paper.py are the paper's.
          config: The experiment that the weights are of.
          workdir: Folder of the new run; runs/NAME-OF-FILE if not given.
          data: Kind of data source to use instead of the config's.
          network: Kind of network to use instead of the config's.
          decoder_variance: Kind of decoder variance to use instead of the config's.
        """
        from bsvae_jax.training import import_torch as importing

        folder = Path("runs") / file.stem if workdir is None else workdir
        imported = importing.import_torch(file, config, folder)
        print(f"{imported.parameters:,} parameters of {file} (SHA-256 {imported.sha256}): {folder}")
        print(f"Its variance is not calibrated; bsvae evaluate {folder} takes that of the training set.")

    return import_torch


_Fixed = tyro.conf.Suppress[tyro.conf.Fixed[Any]]


@dataclasses.dataclass(frozen=True)
class _SweepBase(Config):
    """A config without options for what a sweep has lists for."""

    beta: _Fixed = 1.0
    decoder_variance: _Fixed = dataclasses.field(default_factory=Optimal)
    prior: _Fixed = dataclasses.field(default_factory=configs.StandardNormal)


def _sweep_command(default: Config, file_grid: Sweep) -> Callable[..., None]:
    """`bsvae sweep` with the fields of `default` as options."""
    values = {field.name: getattr(default, field.name) for field in dataclasses.fields(Config)}

    def sweep(
        config_file: tyro.conf.Positional[Path],
        config: Annotated[_SweepBase, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands] = _SweepBase(**values),
        beta: tuple[float, ...] = file_grid.beta,
        decoder_variance: tuple[DECODER_VARIANCE, ...] | None = None,
        constant: Annotated[tuple[float, ...] | None, tyro.conf.arg(name="decoder-variance.variance")] = None,
        optimal: Annotated[tuple[SHARED, ...] | None, tyro.conf.arg(name="decoder-variance.over")] = None,
        prior: tuple[PRIOR, ...] | None = None,
        components: Annotated[tuple[int, ...] | None, tyro.conf.arg(name="prior.components")] = None,
        pseudo_inputs: Annotated[tuple[int, ...] | None, tyro.conf.arg(name="prior.pseudo-inputs")] = None,
        learning_rate: tuple[float, ...] = file_grid.learning_rate,
        seeds: int = file_grid.seeds,
        workdir: Path | None = None,
        driving: DRIVING | None = None,
        members_at_once: int | None = None,
        data: DATA | None = None,
        network: NETWORK | None = None,
    ) -> None:
        """Train every combination of the lists and write the report; run it again to continue, or with longer lists.

        Members that differ only in beta, seed, learning rate or a constant variance are trained as one compiled program. Each
        ends as a run of its own in WORKDIR/members, just as bsvae train leaves it.

        Example: bsvae sweep configs/digits.py --beta 0.1 1 10 --decoder-variance optimal constant --seeds 3

        Args:
          config_file: A Python file with get_config(), and get_sweep() if it has a grid of its own.
          config: The base of all members.
          beta: Weights of the rate.
          decoder_variance: Kinds of decoder variance; those of the config file if not given.
          constant: Variances of the constant kind, a member for each.
          optimal: What shares one optimal variance, a member for each.
          prior: Kinds of prior; those of the config file if not given.
          components: Numbers of components of the mixture kind, a member for each.
          pseudo_inputs: Numbers of pseudo-inputs of the vamp kind, a member for each.
          learning_rate: Peak learning rates; the config's own if not given.
          seeds: Number of seeds, counted up from --seed.
          workdir: Folder of this sweep; runs/NAME-OF-CONFIG-sweep if not given.
          driving: How members share a program: one after the other in separate calls, one after the other in one call, or side
            by side; what was measured to be fastest if not given.
          members_at_once: Members in one program; as many as fit into memory if not given.
          data: Kind of data source to use instead of the config's.
          network: Kind of network to use instead of the config's.
        """
        from bsvae_jax.sweeps.fit_sweep import fit_sweep

        variances = choose_variances(default, file_grid.decoder_variance, decoder_variance, constant, optimal)
        priors = choose_priors(default, file_grid.prior, prior, components, pseudo_inputs)
        grid = Sweep(beta, variances, seeds, learning_rate, priors)
        base = Config(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Config)})
        folder = Path("runs") / f"{config_file.stem}-sweep" if workdir is None else workdir
        _keep_compiled_programs()
        result = fit_sweep(base, grid, folder, driving, members_at_once)
        _report(folder)
        if result.failed:
            raise DivergenceError(f"{len(result.failed)} diverged: {', '.join(result.failed)}. The report has the rest.")

    return sweep


def _compile_command(default: Config) -> Callable[..., None]:
    """`bsvae compile` with the fields of `default` as options."""

    def compile(
        config_file: tyro.conf.Positional[Path],
        config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands] = default,
        topology: tuple[str, ...] = ("v5e:2x4",),
        members: int = 1,
        scaling: Literal["weak", "strong"] | None = None,
        image_shape: tuple[int, int, int] | None = None,
        images: int | None = None,
        full: bool = False,
        data: DATA | None = None,
        network: NETWORK | None = None,
        decoder_variance: DECODER_VARIANCE | None = None,
        prior: PRIOR | None = None,
    ) -> None:
        """Compile the training and sampling programs of a config for a machine, which need not be there.

        Prints per device the arithmetic, the memory moved and held, the communication, the least time of a step by the
        machine's published peaks, and the largest batch that fits. TPUs are compiled for with libtpu alone; nothing is run and
        no data are read where their size is known.

        Example: bsvae compile configs/mnist.py --topology v5e:2x4 --precision bfloat16 --batch-size 4096

        Args:
          config_file: A Python file with get_config(); configs/ holds ready ones.
          config: The experiment.
          topology: A TPU and the arrangement of its chips, v2:2x2x1 to v6e:16x16; or cpu, gpu or tpu, those of this machine.
            With several and --scaling, a table.
          members: Compile a stack of so many members of a sweep, divided over the devices.
          scaling: weak: batch_size images, or --members, on every device; strong: on all of them together.
          image_shape: Height, width and channels, in place of the data's own, which are then not read.
          images: Number of training images, with --image-shape.
          full: Let the compiler of TPUs take its time, minutes, as it does before training; times are about the same.
          data: Kind of data source to use instead of the config's.
          network: Kind of network to use instead of the config's.
          decoder_variance: Kind of decoder variance to use instead of the config's.
          prior: Kind of prior to use instead of the config's.
        """
        from bsvae_jax.data import shape_of
        from bsvae_jax.profiling import aot
        from bsvae_jax.training.step import check_against_shape

        shape = shape_of(config.data, image_shape, images)
        check_against_shape(config, shape)
        check_count("--members", members)
        if scaling is None:
            for name in topology:
                compiled = aot.compile_training(config, shape, name, None, members, full)
                print(aot.describe(compiled))
                if compiled.chip is not None:
                    other = aot.compile_other_batch(config, shape, name, None, members, full)
                    unit = config.gradient_accumulation * (compiled.devices if members == 1 else 1)
                    largest = aot.largest_batch(compiled, other, unit)
                    if other is not None and largest is not None:
                        print(
                            f"largest batch that fits: about {largest:,}, by the memory of {compiled.batch_size} "
                            f"and of {other.batch_size}"
                        )
                sampling = aot.compile_sampling(config, shape, name, None, full)
                print(f"sampling 500 images: {sampling.flops:.3g} FLOP, {sampling.bytes_accessed:.3g} bytes per device\n")
            return
        rows = []
        for name in topology:
            count = len(aot.machine(name, config.devices)[0])
            grown = 1 if scaling == "strong" else count
            if members == 1:
                own = dataclasses.replace(config, batch_size=config.batch_size * grown)
                rows.append(aot.compile_training(own, shape, name, None, 1, full))
            else:
                rows.append(aot.compile_training(config, shape, name, None, members * grown, full))
            print(aot.scaling_table(rows).splitlines()[-1], file=sys.stderr)
        print(aot.scaling_table(rows))
        print("Computed, not measured: the compiler's counts and published peaks.")

    return compile


def _bench_command(default: Config) -> Callable[..., None]:
    """`bsvae bench` with the fields of `default` as options."""

    def bench(
        config_file: tyro.conf.Positional[Path],
        config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands] = default,
        repeats: int = 5,
        seconds: float = 3.0,
        against: Literal["torch"] | None = None,
        noise: bool = False,
        data: DATA | None = None,
        network: NETWORK | None = None,
        decoder_variance: DECODER_VARIANCE | None = None,
        prior: PRIOR | None = None,
    ) -> None:
        """Measure how fast a config trains on the devices at hand; nothing is saved.

        Example: bsvae bench configs/mnist.py --against torch

        Args:
          config_file: A Python file with get_config(); configs/ holds ready ones.
          config: The experiment.
          repeats: Measurements, of which the median counts.
          seconds: Length of each.
          against: torch: train the same network by the same recipe in PyTorch as well, before and after which this is measured,
            and print the ratio to the best of its settings.
          noise: Train on noise of the size of the data, which are then not read.
          data: Kind of data source to use instead of the config's.
          network: Kind of network to use instead of the config's.
          decoder_variance: Kind of decoder variance to use instead of the config's.
          prior: Kind of prior to use instead of the config's.
        """
        from bsvae_jax.data import load, shape_of
        from bsvae_jax.profiling import benchmark

        _keep_compiled_programs()
        images = benchmark.random_images(shape_of(config.data)) if noise else load(config.data)
        speed = benchmark.measure(config, images, repeats, seconds)
        if against is None:
            print(benchmark.describe(speed))
            return
        peers = benchmark.measure_torch(config, images, repeats, seconds)
        speed = benchmark.combined(speed, benchmark.measure(config, images, repeats, seconds))
        print(benchmark.describe(speed))
        print(benchmark.describe_against(speed, peers))

    return bench


def report(workdir: tyro.conf.Positional[Run]) -> None:
    """Write the table, the figures and report.html of a sweep from what has finished so far.

    Leaves table.csv, table.md, members.csv, report.html and figures in the folder; needs neither data nor a device.

    Args:
      workdir: Folder that bsvae sweep wrote.
    """
    _report(workdir)


def _report(folder: Path) -> None:
    from bsvae_jax.sweeps.report import best_beta, findings, status, write_report
    from bsvae_jax.sweeps.results import as_text, read_results

    *_, page = write_report(folder)
    results = read_results(folder)
    print(f"{status(results)} Test set, mean ± standard deviation over seeds:\n\n{as_text(results)}\n")
    print("\n".join([*best_beta(results), *findings(results)]))
    print(f"\nreport: {page}")


def evaluate(
    workdir: tyro.conf.Positional[Run],
    split: tuple[Literal["train", "test"], ...] = ("train", "test"),
    checkpoint: Literal["latest", "best"] = "latest",
    samples: int | None = None,
    bound_images: int | None = None,
    fid: int | None = None,
    protocol: Literal["standard", "paper"] = "standard",
    fid_network: Literal["inception", "lenet"] = "inception",
    inception_weights: Path | None = None,
    prior: Literal["model", "fitted"] = "model",
    figures: bool = True,
) -> None:
    """Evaluate a trained run, or every finished member of a sweep: a table with units and standard errors, and figures.

    The profile likelihood gives each image its own optimal variance and is not a density; the calibrated one freezes the
    training set's variance and is. Compare models by the calibrated one. The numbers go to evaluation.json in the folder, the
    figures to figures/. Long computations continue where they were interrupted.

    Args:
      workdir: Folder that bsvae train or bsvae sweep wrote.
      split: Splits to evaluate.
      checkpoint: The end of training, or the least held-out objective.
      samples: Importance samples per image for a tighter bound of log p(x), 1 to 5,000; no such bound if not given.
      bound_images: Take that bound of the first so many images only.
      fid: Compute FID and KID with so many samples of the prior against the images of each split; 10,000 is usual.
      protocol: The paper stretches the contrast of each of 25,600 samples before FID; its numbers are marked as such.
      fid_network: The published network; or a LeNet trained here on the classes of the data, as for KID of MNIST, whose numbers
        have names of their own and need no download.
      inception_weights: Weights of the published network, pytorch-fid's .pth or an .npz; downloaded at first use if not given.
      prior: fitted gives the numbers under the density of bsvae fit-prior as well, beside those of the model's own.
      figures: Draw figures; --figures False leaves them out.
    """
    from bsvae_jax.data import load
    from bsvae_jax.evaluation.evaluate import PAPER_SAMPLES, Fid
    from bsvae_jax.evaluation.fid.inception import load_weights
    from bsvae_jax.evaluation.importance_weighted import check_samples

    if not split:
        raise UserError("--split needs at least one of train and test.")
    if samples is not None:
        check_samples(samples)
    if protocol == "paper" and fid is None:
        fid = PAPER_SAMPLES
    if fid is None and inception_weights is not None:
        raise UserError("--inception-weights is for FID; give --fid N, the number of samples, as well.")
    if fid is None and fid_network != "inception":
        raise UserError("--fid-network is for FID; give --fid N, the number of samples, as well.")
    if fid_network == "lenet" and inception_weights is not None:
        raise UserError("--inception-weights is for --fid-network inception; lenet is trained on the data.")
    options = None
    if fid is not None:
        options = Fid(fid, protocol=protocol, network=fid_network)
        if inception_weights is not None:
            options = dataclasses.replace(options, weights=load_weights(inception_weights))
    is_sweep = (workdir / "sweep.json").is_file()
    load_once = functools.cache(load)  # members of a sweep share their data
    for folder in _finished_members(workdir) if is_sweep else [workdir]:
        if is_sweep:
            print(f"\n{folder.name}")
        shown = figures and not is_sweep
        _evaluate_run(folder, load_once, split, checkpoint, samples, bound_images, options, prior, shown)
    if is_sweep:
        _report(workdir)


def _finished_members(folder: Path) -> list[Path]:
    from bsvae_jax.sweeps.results import read_results

    return [folder / "members" / member.name for member in read_results(folder).members]


def _evaluate_run(
    folder: Path,
    load: Callable[[configs.Dataset], Any],
    split: tuple[str, ...],
    checkpoint: Literal["latest", "best"],
    samples: int | None,
    bound_images: int | None,
    fid: Any,
    prior: str,
    figures: bool,
) -> None:
    from bsvae_jax.evaluation import diagnostic_figures, metrics
    from bsvae_jax.evaluation import evaluate as evaluation
    from bsvae_jax.training import workdir as rundir
    from bsvae_jax.training.fitted_prior import read_fitted
    from bsvae_jax.training.restore import restore

    run = restore(folder, checkpoint)
    with_fitted = restore(folder, checkpoint, "fitted") if prior == "fitted" else None
    images = load(run.config.data)
    rundir.check_same_data(folder, rundir.read_info(folder), images)
    evaluate = functools.partial(
        evaluation.evaluate, samples=samples, bound_images=bound_images, fid_options=fid, workdir=folder, progress=True
    )
    found = evaluate(run, images, split)
    report = found.report
    if with_fitted is not None and (fitted := read_fitted(folder)) is not None:
        report = evaluation.beside(report, evaluate(with_fitted, images, split).report, fitted.describe())
    rundir.write_evaluation(folder, run.step, report, checkpoint)
    print(metrics.as_table(report))
    if (sentence := metrics.left_out(images)) is not None:
        print(sentence)
    if figures:
        diagnostic_figures.draw(run, images, found, folder)
        if with_fitted is not None:
            diagnostic_figures.draw_fitted(run, with_fitted, images, found, folder)
        print(f"figures: {folder / 'figures'}")


def sample(
    workdir: tyro.conf.Positional[Run],
    count: int = 100,
    out: Path | None = None,
    seed: int = 0,
    checkpoint: Literal["latest", "best"] = "latest",
    prior: Literal["model", "fitted"] = "model",
    overwrite: bool = False,
) -> None:
    """Draw images from a trained run: z from the prior, then the decoder's mean, as 8-bit images; float32 for other data.

    An interrupted command continues where it stopped when it is given again.

    Args:
      workdir: Folder that bsvae train wrote.
      count: Number of images.
      out: A .npz file (array images, uint8 [N, H, W, C]; of other data float32 [N, ...]), a .png file (one grid), or a folder
        (one PNG per image); WORKDIR/samples.npz if not given.
      seed: Decides the images; the first ones do not depend on count.
      checkpoint: The end of training, or the least held-out objective.
      prior: The one that the model was trained with, or the one that bsvae fit-prior fitted afterwards.
      overwrite: Replace what is already at out.
    """
    from bsvae_jax._io.terminal import ProgressBar
    from bsvae_jax.evaluation import sampling
    from bsvae_jax.evaluation.plots import image_grid, save
    from bsvae_jax.training.restore import restore

    if count < 1:
        raise UserError(f"--count must be >= 1, got {count}.")
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed must lie in 0 ... 2**32 - 1, got {seed}.")
    out = workdir / "samples.npz" if out is None else out
    if out.suffix in (".npz", ".png") and out.exists() and not overwrite:
        raise UserError(f"{out} exists; give another --out, or --overwrite to replace it.")
    run = restore(workdir, checkpoint, prior)
    if out.suffix != ".npz":
        sampling.check_png(run)
    there = 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".png":
            images = sampling.sample_prior(run, count, seed)
            save(image_grid(images / 255.0, f"{count} samples of the {'fitted ' if prior == 'fitted' else ''}prior"), out)
        else:
            write = sampling.write_npz if out.suffix == ".npz" else sampling.write_folder
            with ProgressBar(count, 0, enabled=count > sampling.BATCH) as bar:
                there = write(run, out, count, seed, overwrite, bar.update)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}).") from error
    before = f", {there} of them there already" if there else ""
    print(f"{count} images {run.image_shape}{before}: {out}")


def fit_prior(
    workdir: tyro.conf.Positional[Run],
    kind: FITTED = "mixture",
    components: int = 10,
    seed: int = 0,
    checkpoint: Literal["latest", "best"] = "latest",
    overwrite: bool = False,
    steps: int = 10_000,
    width: int = 128,
    depth: int = 4,
) -> None:
    """Fit a density to the latents of a trained run, for bsvae sample and evaluate --prior fitted.

    It is fitted to samples of the posteriors of nine tenths of the training images and kept in WORKDIR/prior.npz; the model
    stays as it is. Samples of the prior that decode badly usually lie where no image has its posterior: this density does not
    go there.

    Example: bsvae fit-prior runs/digits --kind mixture --components 20

    Args:
      workdir: Folder that bsvae train wrote, or a member of a sweep.
      kind: A Gaussian or a mixture of Gaussians with full covariances, a flow of affine coupling layers, or flow matching: a
        transformer over the latent map, trained by gradient descent. An interrupted training continues when it is given again.
      components: Gaussians of a mixture.
      seed: Decides the samples of the posteriors and where the fit starts.
      checkpoint: The end of training, or the least held-out objective; the prior is of that one alone.
      overwrite: Replace a prior of another kind or checkpoint.
      steps: Of training, for flow matching.
      width: Of the transformer of flow matching.
      depth: Blocks of it.
    """
    from bsvae_jax.training import fit_prior as fitting
    from bsvae_jax.training.fitted_prior import FILE

    fitted = fitting.fit_prior(workdir, kind, components, seed, checkpoint, overwrite, steps, width, depth, progress=True)
    before = "" if fitted.held_out_before is None else f", {fitted.held_out_before:.2f} under the model's own prior"
    print(
        f"{fitted.describe()}, fitted to the latents of step {fitted.step}: {workdir / FILE}\n"
        f"log density of the latents of held-out training images: {fitted.held_out:.2f} nats per image{before}; their rate "
        "falls by the difference.\n"
        f"bsvae sample {workdir} --prior fitted and bsvae evaluate {workdir} --prior fitted use it."
    )


def export(
    workdir: tyro.conf.Positional[Run],
    out: Path | None = None,
    checkpoint: Literal["latest", "best"] = "latest",
    overwrite: bool = False,
) -> None:
    """Write the weights of a run as a .safetensors file: float32 parameters and batch statistics, the config as metadata.

    Args:
      workdir: Folder that bsvae train or bsvae import-torch wrote.
      out: The file, NAME.safetensors; WORKDIR/weights.safetensors if not given.
      checkpoint: The end of training, or the least held-out objective.
      overwrite: Replace what is already at out.
    """
    from bsvae_jax.training.export import export_safetensors

    out = export_safetensors(workdir, workdir / "weights.safetensors" if out is None else out, checkpoint, overwrite)
    print(f"weights: {out}")


def _first_line(error: Exception) -> str:
    """What the compiler or the allocator says, with the size asked for."""
    return str(error).strip().split("\n")[0][:300].rstrip(".")


_LESS_MEMORY = "A smaller batch_size or network needs less."


_CHOOSE: dict[str, Callable[..., Config]] = {
    "train": _choose,
    "compile": _choose,
    "bench": _choose,
    "sweep": _choose_for_sweep,
    "import-torch": _choose_for_import,
}
"""Commands whose options are those of a config file."""


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Exit status 2: the message says what was wrong; 130 and 143: stopped by SIGINT or SIGTERM, the same command continues.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Of a save that fails, Orbax closes its event loop before all of TensorStore's threads have told it so; what is left of
    # them complains on stderr, a dozen times, beside the sentence in which the failure is reported.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    complain = sys.unraisablehook
    sys.unraisablehook = lambda error: None if str(error.exc_value) == "Event loop is closed" else complain(error)
    try:
        default: Any = Config()
        grid = Sweep()
        if len(arguments) > 1 and arguments[0] in _CHOOSE and arguments[1] not in ("-h", "--help"):
            what, files = ("The files come", 2) if arguments[0] == "import-torch" else ("The config file comes", 1)
            if len(arguments) <= files or any(argument.startswith("-") for argument in arguments[1 : 1 + files]):
                wanted = "FILE CONFIG" if files == 2 else "CONFIG"
                raise UserError(f"{what} first: bsvae {arguments[0]} {wanted} [options].")
            # The config decides which options there are, so its file and the kinds named beside it are read first.
            default, _ = tyro.cli(_CHOOSE[arguments[0]], args=arguments[1:], return_unknown_args=True, add_help=False)
            grid = load_sweep(arguments[1]) if arguments[0] == "sweep" else grid
        tyro.extras.subcommand_cli_from_dict(
            {
                "train": _train_command(default),
                "sweep": _sweep_command(default, grid),
                "compile": _compile_command(default),
                "bench": _bench_command(default),
                "report": report,
                "prepare": prepare,
                "evaluate": evaluate,
                "sample": sample,
                "fit-prior": fit_prior,
                "import-torch": _import_command(default),
                "export": export,
            },
            prog="bsvae",
            description="Gaussian VAEs with their decoder variance treated properly.",
            args=arguments,
            config=(tyro.conf.FlagConversionOff,),
        )
    except BsvaeError as error:
        _refuse(str(error))
    except OSError as error:  # its text names the file
        _refuse(f"{error}. Free some space and repeat the command; it continues" if error.errno == errno.ENOSPC else str(error))
    except MemoryError as error:
        _refuse(f"out of memory ({error}). {_LESS_MEMORY}")
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _refuse(f"out of device memory: {_first_line(error)}. {_LESS_MEMORY}")
    except Interrupted as error:
        print(f"\n{error}; the same command continues there", file=sys.stderr)
        sys.exit(128 + error.number)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues from what is saved", file=sys.stderr)
        sys.exit(130)
    finally:
        sys.unraisablehook = complain
