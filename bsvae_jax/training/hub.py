"""A run as a folder that a model hub accepts, and that `restore` opens: weights, config, numbers and a model card."""

import dataclasses
import json
import math
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml

from bsvae_jax import config as configs
from bsvae_jax._io.files import as_path, read_json, sha256_of, write_atomically, write_json
from bsvae_jax.config import is_builtin
from bsvae_jax.errors import UserError, check_kind
from bsvae_jax.evaluation.metrics import CONDITIONAL, Report
from bsvae_jax.evaluation.trained import Restored
from bsvae_jax.training.evaluated import read_evaluation, without, write_evaluation
from bsvae_jax.training.export import write_weights
from bsvae_jax.training.identity import EDITED, write_run_arrays
from bsvae_jax.training.restore import WEIGHTS, restore

TASK = "unconditional-image-generation"
"""What the hub calls the task of a generative model of images; it has no name for that of one conditional on a class."""

CARD = """# {name}

A Gaussian variational autoencoder, trained on **{data}** ({examples}) for {step:,} steps by bsvae_jax {version}, the JAX
implementation of Beta-Sigma VAE ([Kim & Lee 2024]({paper})): β = {beta:g}, decoder variance {decoder_variance}, prior
{prior}, network {network}, {latents} latents. `config.json` has the whole experiment.

## Numbers

{numbers}

## Use

```python
import jax, bsvae_jax as bv

run = bv.restore({place}{classes})  # this folder; huggingface_hub.snapshot_download("OWNER/NAME") gives one of the hub
{labels}samples = run.model.apply(run.variables, jax.random.key(0), 16{given}, method="sample")  # {shape} each
posterior = run.model.apply(run.variables, samples{given}, method="encode")  # posterior.mean, posterior.log_variance
```

`bsvae sample FOLDER` and `bsvae evaluate FOLDER --data.path DATA` take the folder as well.

## Citation

```bibtex
@article{{kim2024bsvae,
  title   = {{Beta-Sigma VAE: Separating beta and decoder variance in Gaussian variational autoencoder}},
  author  = {{Kim, Seunghwan and Lee, Seungkyu}},
  journal = {{arXiv preprint arXiv:2409.09361}},
  year    = {{2024}}
}}
```
"""
PAPER = "https://arxiv.org/abs/2409.09361"


def export_hub(
    workdir: str | Path,
    out: str | Path,
    checkpoint: Literal["latest", "best"] = "latest",
    overwrite: bool = False,
    license: str | None = None,
) -> Path:
    """Write a folder for a model hub: README.md (the model card), config.json, model.safetensors, and what is known of numbers.

    `restore`, `bsvae sample` and `bsvae evaluate` take the folder as they take a run. Paths of this machine are not in it: of
    where the data lay it has the last name only. The card begins with the fields of the Hugging Face hub's model cards; the
    numbers are those of `bsvae evaluate` for these very parameters, none where it was not run of them.

    Args:
      workdir: of `fit`, `import_torch`, or a member of a sweep.
      out: the folder, whose name is that of the model.
      checkpoint: as for `restore`.
      overwrite: replace what is already there.
      license: under which the model is given away, as the hub spells it, apache-2.0 for one; left out if not given.

    Returns:
      The folder.

    >>> import tempfile
    >>> import bsvae_jax as bv
    >>> config = bv.Config(network=configs.MLP((8,)), latent_size=2, epochs=1, batch_size=500, devices=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = bv.fit(config, f"{folder}/run", progress=False)
    ...     out = export_hub(f"{folder}/run", f"{folder}/digits")
    ...     bv.restore(out).step, sorted(path.name for path in out.iterdir())
    (3, ['README.md', 'calibration.npz', 'config.json', 'evaluation.json', 'model.safetensors'])

    Raises:
      UserError: as `restore`; another license than a short name, files that exist, or a place that cannot be written.
    """
    workdir, out = as_path(workdir, "workdir"), as_path(out, "out")
    if license is not None:
        check_kind("license", license, str)
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
            raise UserError(f"license must be the hub's short name of one, apache-2.0 or mit for example, got {license!r}.")
    names = (WEIGHTS, "README.md", "config.json", "calibration.npz", "evaluation.json")
    if (there := [name for name in names if (out / name).exists()]) and not overwrite:
        raise UserError(f"{out} has {', '.join(there)}; give another --out, or --overwrite to replace them.")
    if out.resolve() == workdir.resolve():
        raise UserError(f"{out} is the run itself; give another --out.")
    run = restore(workdir, checkpoint)
    run = run._replace(config=dataclasses.replace(run.config, data=_without_places(run.config.data)))
    write_weights(run, out / WEIGHTS)
    try:
        for name in names[1:]:
            (out / name).unlink(missing_ok=True)
        with read_json(workdir / "config.json", EDITED) as values:
            description = {name: value for name, value in values.items() if name != "digest"}
        description["config"] = configs.to_dict(run.config)
        if (source := description.get("started_from")) is not None:
            description["started_from"] = source | {"workdir": Path(source["workdir"]).name}
        description["exported"] = {"step": run.step, "sha256": sha256_of(out / WEIGHTS), "multiplier": run.multiplier}
        write_json(out / "config.json", description)
        if run.calibration is not None:
            write_run_arrays(out / "calibration.npz", **run.calibration._asdict())
        report: Report = {}
        evaluation = read_evaluation(workdir, checkpoint)
        if evaluation is not None and evaluation.step == run.step:
            report = without(evaluation.report, "fitted_")  # of the model's own prior, which is the one that the folder has
            write_evaluation(out, run.step, report, findings=evaluation.findings)
        card = model_card(run, out.resolve().name, description["data"], report, license)
        write_atomically(out / "README.md", card.encode())
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}).") from error
    return out


def _without_places(data: configs.Dataset) -> configs.Dataset:
    """The data without the folders of this machine that they lay in."""
    places = {name: getattr(data, name) for name in data.locations}
    return dataclasses.replace(data, **{name: Path(place).name for name, place in places.items() if isinstance(place, str)})  # type: ignore[arg-type]


def model_card(run: Restored, name: str, data: dict[str, Any], report: Report, license: str | None = None) -> str:
    """The README.md of a model: YAML for the hub, then what it is, its numbers, how to load it, what to cite.

    Args:
      run: the model.
      name: of it.
      data: what `config.json` says of the data.
      report: its numbers; splits and quantities that are not finite are left out of the YAML.
      license: short name of one, or None.
    """
    splits = {split: own for split, own in report.items() if split != "train"}
    task = TASK if run.holds_images and run.config.classes is None else "other"
    results = [
        {
            "task": {"type": task},
            "dataset": {"name": data["name"], "type": data["name"], "split": split},
            "metrics": [
                {"type": quantity, "name": f"{quantity} [{own.unit}]", "value": own.value}
                for quantity, own in quantities.items()
                if math.isfinite(own.value)
            ],
        }
        for split, quantities in splits.items()
    ]
    front = {
        **({} if license is None else {"license": license}),
        "library_name": "bsvae_jax",
        **({"pipeline_tag": task} if task == TASK else {}),
        "tags": ["jax", "flax", "variational-autoencoder", "arxiv:2409.09361"],
        "datasets": [data["name"]],
        **({"model-index": [{"name": name, "results": results}]} if results else {}),
    }
    config = run.config
    own_classes = not all(is_builtin(getattr(config, field)) for field in configs.KINDS)
    counts = ", ".join(f"{data[split]:,} {split} examples" for split in ("train", "validation", "test") if split in data)
    text = CARD.format(
        name=name,
        data=data["name"],
        examples=f"{counts} of shape {run.image_shape}",
        step=run.step,
        version=version("bsvae_jax"),
        paper=PAPER,
        beta=run.beta,
        decoder_variance=config.decoder_variance.label,
        prior=config.prior.label,
        network=config.network.label,
        latents=config.latent_size,
        numbers=_numbers(report, conditional=config.classes is not None),
        place=json.dumps("."),
        classes=', config="FILE.py"' if own_classes else "",
        shape=run.image_shape,
        labels="" if config.classes is None else f"labels = jax.numpy.arange(16) % {config.classes}  # the class of each\n",
        given="" if config.classes is None else ", labels=labels",
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n{text}"


def _numbers(report: Report, conditional: bool) -> str:
    """A Markdown table with standard errors, and what has to be known of it."""
    if not report:
        return "This checkpoint has not been evaluated; `bsvae evaluate FOLDER` does it."
    names = list(dict.fromkeys(name for quantities in report.values() for name in quantities))
    lines = [["quantity", *report, "unit", "meaning"], ["---"] * (len(report) + 3)]
    for name in names:
        found = [quantities.get(name) for quantities in report.values()]
        known = next(quantity for quantity in found if quantity is not None)
        cells = ["n/a" if quantity is None else quantity.cell() for quantity in found]
        meaning = known.meaning.replace("p(x)", "p(x|y)") if conditional else known.meaning
        lines.append([name, *cells, known.unit, meaning.replace("|", "\\|")])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"{table}\n\n± is the standard error of the mean over the examples of a split. The *profile* ELBO gives every "
        "example its own optimal variance\nand is no density; the *calibrated* one freezes that of the training set, and is "
        "one. Never compare the two." + (f"\n\n{CONDITIONAL}" if conditional else "")
    )
