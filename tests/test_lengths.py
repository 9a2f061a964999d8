"""Models whose number of positions, or of calls, follows from what they read: refused with that reason."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from interp.errors import Refused
from interp.models.lengths import follow_values
from interp.models.model import Model
from interp.models.probe import probe_batch
from interp.models.recording import record
from tests.test_kernels import WIDTH, Block


class Frame(Block):
    """A block that is told where its positions are."""

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        return x + self.attn(self.norm(x) + at)


class Speaker(nn.Module):
    """Says each position as long as the first stack predicts, or twice."""

    def __init__(self, predicts: bool) -> None:
        super().__init__()
        self.config = PreTrainedConfig(vocab_size=97)
        self.config._attn_implementation_internal = "sdpa"
        self.embed, self.predicts = nn.Embedding(97, WIDTH), predicts
        self.texts = nn.ModuleList(Block(self.config) for _ in range(2))
        self.frames = nn.ModuleList(Frame(self.config) for _ in range(2))
        self.positions = nn.Embedding(512, WIDTH)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.embed(input_ids)
        for block in self.texts:
            x = block(x)
        times = (4 * x[0, :, 0].abs()).long() + 1 if self.predicts else 2
        x = x.repeat_interleave(times, 1)
        at = self.positions.weight[: x.shape[1]]
        for block in self.frames:
            x = block(x, at)
        return SimpleNamespace(last_hidden_state=x)


def speaker(predicts: bool) -> Speaker:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Speaker(predicts).eval()


def test_positions_that_follow_from_predicted_durations_are_told() -> None:
    with pytest.raises(Refused, match="follows from the values of 'input_ids', not from its shape"):
        Model(speaker(predicts=True))


def test_shapes_that_follow_from_shapes_are_no_reason() -> None:
    module = speaker(predicts=False)
    batch = probe_batch(module)
    with torch.no_grad():
        assert follow_values(record(module, batch), module, batch) == ""
    assert Model(module).n_layers == 2


class InPieces(nn.Module):
    """Its last block reads sixteen positions at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PreTrainedConfig(vocab_size=97)
        self.config._attn_implementation_internal = "sdpa"
        self.embed = nn.Embedding(97, WIDTH)
        self.blocks = nn.ModuleList(Block(self.config) for _ in range(2))

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.blocks[0](self.embed(input_ids))
        x = torch.cat([self.blocks[1](piece) for piece in x.split(16, 1)], 1)
        return SimpleNamespace(last_hidden_state=x)


def test_a_block_called_more_often_than_on_the_probe_is_refused() -> None:
    torch.manual_seed(0)
    model = Model(InPieces().eval())
    short, long = (torch.arange(n)[None] for n in (12, 20))
    assert model.run(short, capture=["resid_post"]).cache["resid_post.1"].shape[1] == 12
    for site in ("resid_pre.1", "resid_post.1", "attn_out.1", "z.1"):
        with pytest.raises(Refused, match=r"'blocks.1.* more often than on the probe"):
            model.run(long, capture=[site])
    assert model.run(long, capture=["z.0", "resid_post.0"]).cache["resid_post.0"].shape[1] == 20
