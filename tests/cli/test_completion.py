"""The tab key, in a real bash; and `--json` of the commands that compile."""

import json
import shutil
import subprocess

import pytest
from helpers import main

from bsvae_jax.cli.main import COMMANDS

# What bash does with a word that is being typed; it runs the function that the script has registered.
COMPLETE = """
source "$1"
COMP_WORDS=("${@:2}")
COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
registered=$(complete -p bsvae)
[[ $registered == *"-o default"* ]] || exit 1
registered=${registered#*-F }
${registered%% *}
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.long
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_options_and_choices(tmp_path, capsys):
    main("completion", "bash")
    (tmp_path / "bsvae").write_text(capsys.readouterr().out)

    def typed(*words):
        script = ["bash", "-c", COMPLETE, "bash", str(tmp_path / "bsvae"), "bsvae", *words]
        return set(subprocess.run(script, capture_output=True, text=True, check=True).stdout.split())

    assert typed("") >= set(COMMANDS)
    assert typed("com") == {"compare", "compile", "completion"}
    assert typed("train", "configs/digits.py", "--be") == {"--beta", "--beta-schedule"}
    assert typed("sweep", "configs/digits.py", "--seeds") == {"--seeds"}
    assert typed("export", "runs/digits", "--format", "") >= {"safetensors", "stablehlo", "hub"}
    assert typed("runs", "--memb") >= {"--members"}
    assert typed("report", "runs/x", "--js") >= {"--json"}
    # Descriptions of several lines are no words to complete.
    assert typed("train", "configs/digits.py", "--prec") == {"--precision"}
    assert all(word.startswith("-") for word in typed("train", "configs/digits.py", "--"))


@pytest.mark.long
def test_compile_prints_one_document(tmp_path, capsys):
    (tmp_path / "small.py").write_text(
        "import bsvae_jax as bv\n"
        "print('hello')\n"  # no part of the document
        "def get_config():\n"
        "    return bv.Config(network=bv.config.MLP((8,)), latent_size=2, batch_size=64, devices=1)\n"
    )
    main("compile", tmp_path / "small.py", "--topology", "cpu", "--memory", 1, "--json")
    said = capsys.readouterr()
    (machine,) = json.loads(said.out, parse_constant=pytest.fail)["machines"]
    assert machine["memory"] == 2**30
    assert (machine["batch_size"], machine["devices"], machine["chip"]) == (64, 1, None)
    assert machine["peak_memory"] == sum(machine["step"][name] for name in ("arguments", "results", "temporary"))
    assert machine["largest_batch"] > 64
    assert f"about {machine['largest_batch']:,}" in said.err
    main("compile", tmp_path / "small.py", "--topology", "cpu", "--json", "--classes", 10)
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["machines"][0]["memory"] is None  # infinite
