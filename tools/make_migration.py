"""Writes docs/migration.md from the tables of old flags; a test checks that the page is up to date.

python tools/make_migration.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Flags of the reference's launchers and script that Hugging Face does not have, and their equivalents here.
REFERENCE = {
    "--device, --device_id": "`--device`: `0`, `npu`, `npu:3`, `cuda:1`, `cpu`, `auto`",
    "--fp16_opt_level": "the same; O0 to O3 are implemented natively",
    "--loss_scale": "the same; also `dynamic`",
    "--use_combine_grad": "the same; gradients are always views of flat buffers here",
    "--skip_steps": "the same; the device is synchronised before the clock is read",
    "--optim adamw_apex_fused_npu": "the same; if it is not available, the log names the nearest, which is used",
    "--distributed_process_group_timeout": "`--ddp_timeout`, seconds",
    "--data_path": "the same, and it is really read; layouts: [running](running.md#where-rows-come-from)",
    "--half_precision_backend": "`--amp_backend`: `auto`, `native`, `apex`",
    "--overwrite_output_dir": "accepted; the folder is never deleted, only single files are replaced",
    "--local_rank, RANK, WORLD_SIZE, MASTER_*": "read from the environment; the eight-device launchers set them",
    "train_full_1p.sh --TASK= --train_epochs=": "the same; `--help` lists the other flags",
}
# What the reference's scripts leave for the harnesses of ModelZoo, and where it is here.
HARNESS = {
    "`test/output/<device_id>/`": "`test/output/<task>/<model>_<ranks>p_<acc or perf>`, with `_sample` behind it for "
    "`--sample`, so that no two kinds of run share a folder. `test/output/<device_id>` is a link to the newest run's. "
    "The id is the number in `--device`, else `ASCEND_DEVICE_ID`, else 0. Nothing is deleted",
    "`train_<device_id>.log`": "the same. Eight-device launchers write `train_rank_<rank>.log`, one log a rank, and "
    "`train_<device_id>.log` is a link to that of rank 0",
    "`grep \"eval_f1\" train_*.log \\| awk 'END{print $3}'`": "the score, also with other metrics (`eval_accuracy`, "
    "`eval_pearson`, `eval_matthews_correlation`, ...), and the speed with `train_samples_per_second =`. `null` "
    "where a metric is undefined",
    "`CaseName = <Network>_bs32_8p_acc`": "`Bert_<model>_<task>_bs32_8p_acc`: the reference leaves `Network` empty, "
    "and its name is the same for all tasks",
    "`<CaseName>.log`": "the same keys in the same order, then `Device`, and `DataSource` for the sample",
    "`DeviceType`": "the same: `uname -m`. `Device` is what the run used, such as `npu:0`",
    "`train_<CaseName>_loss.txt`": "the same: one training loss a line, every `--logging_steps` steps",
    "`ActualLoss`": "the mean over the training. In the reference it is always empty",
    "`ActualFPS`, `Final Performance images/sec`": "samples/s of the steps after `--skip_steps`, of rows that were "
    "really trained on. `null (reason)` if nothing was measured",
    "`TrainingTime`": "mean time of a step in ms",
    "MNLI's accuracy": "matched; `eval_accuracy_mm` is the mismatched one, which alone the reference's "
    "one-device launcher reports",
}
START = """\
# Migrating from the reference or from Hugging Face's run_glue.py

Command lines of both run here unchanged. A renamed flag causes a one-line note. A flag without effect here is accepted,
and a note gives the reason. A flag that would change what is computed is refused with the reason and exit code 2.
`python tools/make_migration.py` generates this page from the tables that the program uses.

## The reference: Ascend ModelZoo, "Bert_text_classification for PyTorch"

| reference | here |
|---|---|
"""


def page() -> str:
    """The whole page, Markdown."""
    from bert_glue.config.legacy import LEGACY_FLAGS, LEGACY_VALUES

    rows = [f"| `{old}` | {new} |" for old, new in REFERENCE.items()]
    renamed = {name: entry for name, entry in LEGACY_FLAGS.items() if entry.flag}
    ignored = {name: entry for name, entry in LEGACY_FLAGS.items() if not entry.flag and not entry.refused}
    refused = {name: entry for name, entry in LEGACY_FLAGS.items() if entry.refused}
    text = START + "\n".join(rows)
    text += "\n\n### What the harnesses of ModelZoo read\n\n| reference | here |\n|---|---|\n"
    text += "\n".join(f"| {old} | {new} |" for old, new in HARNESS.items())
    text += "\n\n## Hugging Face, 4.18 to 5.x\n\nFlags of TrainingArguments and run_glue.py that are not named below"
    text += " have the same name and meaning here.\n\n### Renamed\n\n| old | here | note |\n|---|---|---|\n"
    text += "".join(f"| `--{n}` | `--{e.flag}` | {e.reason} |\n" for n, e in sorted(renamed.items()))
    text += "".join(f"| `--{flag} {old}` | `--{flag} {new}` | |\n" for (flag, old), new in LEGACY_VALUES.items())
    for title, table in (("Accepted, without effect", ignored), ("Refused", refused)):
        text += f"\n### {title}\n\n| flags | why |\n|---|---|\n"
        for reason in dict.fromkeys(entry.reason for entry in table.values()):
            names = ", ".join(f"`--{name}`" for name, entry in sorted(table.items()) if entry.reason == reason)
            text += f"| {names} | {reason} |\n"
    return text


if __name__ == "__main__":
    (Path(__file__).resolve().parents[1] / "docs" / "migration.md").write_text(page(), encoding="utf-8")
