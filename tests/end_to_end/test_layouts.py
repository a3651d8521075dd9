"""The same configuration gives the same training, whatever launches it and however many workers."""

from __future__ import annotations

import pytest
import torch
from launching import Launcher

pytestmark = pytest.mark.slow

LAYOUTS = [
    ("torchrun", 2, ""),
    ("by hand", 3, ""),
    ("deepspeed by hand", 1, "engine.zero_stage=0"),
    ("deepspeed by hand", 2, "engine.zero_stage=1"),
    ("deepspeed", 2, "engine.zero_stage=2"),
    ("deepspeed by hand", 3, "engine.zero_stage=2"),
]
STEPS = 6


def gradients(launcher: Launcher, name: str) -> dict[str, torch.Tensor]:
    """The backbone's gradient of step 1: momentum without a past, and without weight decay."""
    return {
        key: value
        for key, value in launcher.tensors(name, 0).items()
        if key.startswith("optimizer/") and key.endswith("|momentum_buffer")
    }


def test_every_launcher_and_number_of_workers_gives_the_same_losses_and_gradients(
    launcher: Launcher,
) -> None:
    """Batch norm, dropout, augmentation and a batch of 128 on 3 workers included."""
    limit = [f"training.max_steps={STEPS}", "checkpoint.every_steps=1", "checkpoint.keep_last=9"]
    limit += ["optimizer.weight_decay=0"]
    assert launcher.run("python", 1, *limit, "run.name=one").exit_code == 0
    expected, weights = launcher.losses("one"), launcher.tensors("one")
    gradient = gradients(launcher, "one")
    assert len(gradient) > 10
    assert list(expected) == list(range(1, STEPS + 1))
    for number, (kind, workers, extra) in enumerate(LAYOUTS):
        name = f"run{number}"
        finished = launcher.run(kind, workers, *limit, f"run.name={name}", *filter(None, [extra]))
        assert finished.exit_code == 0, finished.output
        losses = launcher.losses(name)
        assert list(losses) == list(expected), (kind, workers, extra)
        for step, loss in losses.items():
            assert loss == pytest.approx(expected[step], rel=3e-6), (kind, workers, extra, step)
        assert gradients(launcher, name).keys() == gradient.keys()
        for key, value in gradients(launcher, name).items():
            scale = gradient[key].abs().max().item()
            torch.testing.assert_close(value, gradient[key], rtol=0, atol=2e-5 * scale, msg=key)
        for key, value in launcher.tensors(name).items():
            torch.testing.assert_close(value, weights[key], rtol=1e-3, atol=2e-4, msg=key)


@pytest.mark.parametrize(("kind", "workers"), [("by hand", 2), ("deepspeed by hand", 2)])
def test_micro_batches_give_the_losses_of_the_whole_batch(
    launcher: Launcher, kind: str, workers: int
) -> None:
    """Without batch norm, which sees micro-batches; the last batch is short and is cut as well."""
    model = "model={backbone: 'timm:vit_tiny_patch16_224', embedding_dim: 8, norm: none}"
    image = "data.image={size: 32, channels: 1, resize: 0, mean: [0.5], std: [0.25]}"
    settings = [*launcher.settings, model, image, "training.max_steps=3", "data.batch_size=48"]
    settings += ["optimizer.clip_norm=0.5"]
    whole = launcher.run("python", 1, "run.name=whole", settings=settings)
    assert whole.exit_code == 0, whole.output
    pieces = launcher.run(
        kind, workers, "run.name=pieces", "training.accumulate=3", settings=settings
    )
    assert pieces.exit_code == 0, pieces.output
    assert list(launcher.losses("pieces").values()) == pytest.approx(
        list(launcher.losses("whole").values()), rel=1e-5
    )


def test_bfloat16_autocast_is_the_same_under_ddp_and_deepspeed(launcher: Launcher) -> None:
    arguments = ["training.max_steps=3", "engine.precision=bfloat16"]
    for kind, name in (("by hand", "ddp"), ("deepspeed by hand", "deepspeed")):
        finished = launcher.run(kind, 2, f"run.name={name}", *arguments)
        assert finished.exit_code == 0, finished.output
    ddp, deepspeed = launcher.losses("ddp"), launcher.losses("deepspeed")
    assert list(ddp.values()) == pytest.approx(list(deepspeed.values()), rel=1e-5)
    # The parameters stay float32 in both: autocast, not cast weights.
    assert all(t.dtype == torch.float32 for t in launcher.tensors("deepspeed").values() if t.ndim)
