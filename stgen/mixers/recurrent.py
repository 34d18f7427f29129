"""Recurrences over a sequence by PyTorch's own cells, with a projection of what they put out."""

from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from stgen.mixers.spec import Recurrent
from stgen.ops.cost import linear_flops

CELLS: dict[str, Any] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
GATES = {"rnn": 1, "lstm": 4, "gru": 3}


class RecurrentNet(nn.Module):
    def __init__(self, keys: Recurrent, width: int):
        super().__init__()
        self.keys, self.width, self.hidden = keys, width, width // 2 if keys.bidirectional else width
        self.cells = CELLS[keys.kind](width, self.hidden, batch_first=True, bidirectional=keys.bidirectional)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """x [S, n, C], tokens of each sequence [S] or None for all, zeros behind them -> [S, n, C]."""
        if lengths is None or isinstance(x, FakeTensor):  # a dry run has no lengths to go by
            return self.to_out(self.cells(x)[0])
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.cells(packed)[0], batch_first=True, total_length=x.shape[1])
        return self.to_out(out)

    def stream(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The same for sequences [S, n, C] that go on from a state, and the state after them; not bidirectional."""
        hidden, state = self.cells(x, state)
        return self.to_out(hidden), state

    def new_state(self, sequences: int, like: Tensor) -> Any:
        """The state before a sequence."""
        zeros = like.new_zeros(1, sequences, self.hidden)
        return (zeros, zeros) if self.keys.kind == "lstm" else zeros

    def flops(self, tokens: int) -> int:
        directions = 1 + self.keys.bidirectional
        cells = directions * linear_flops(tokens, self.width + self.hidden, GATES[self.keys.kind] * self.hidden)
        return cells + linear_flops(tokens, self.width, self.width)
