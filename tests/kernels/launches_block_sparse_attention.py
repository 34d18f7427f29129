"""Launches of block_sparse_attention's kernels to compile ahead of time: a cover of pairs of what they are specialised to.

Each is compiled with pointers for sm_80 and, where not said otherwise, with tensor descriptors for sm_90.
"""

from functools import partial

import torch
from torch import Tensor

from stgen.ops.block_sparse_attention import triton as kernels
from stgen.ops.block_sparse_attention.lists import BlockLists, Lists
from stgen.ops.normaliser import Normaliser
from stgen.testing.compiled import Launch

HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32
PAIRS = 1 << 20
POLY, POLY_CUT, POLY_E = Normaliser("poly"), Normaliser("poly", -6.0), Normaliser("poly_e")
RELU, RELU2 = Normaliser("relu"), Normaliser("relu2")


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def lists_of(n: int, m: int, block: tuple[int, int], tables: int, partial_blocks: int) -> BlockLists:
    def rows(blocks: int) -> Lists:
        count = empty(1, tables, blocks)
        return Lists(count.long(), count, count, empty(PAIRS), empty(PAIRS))

    (bq, bk), words = block, -(-block[1] // 32)
    return BlockLists(rows(-(-n // bq)), rows(-(-m // bk)), empty(partial_blocks, bq, words), block)


def attend(
    direction: str, block: tuple[int, int] = (64, 64), head_dim: int = 128, dtype: torch.dtype = BF16, n: int = 40960,
    m: int = 40960, shared: int = 1, tables: int = 16, partial_blocks: int = 100, normaliser: Normaliser | None = None,
    sink: bool = False, bias: bool = False, lse: bool = False, descriptors: bool = True,
) -> None:  # fmt: skip
    """`direction` is forward, backward or fast; q, k and v are views of packed projections of 16 heads of queries."""
    q = empty(2, n, 3, 16, head_dim, dtype=dtype)[:, :, 0].transpose(1, 2)
    k, v = empty(2, m, 2, 16 // shared, head_dim, dtype=dtype).transpose(1, 3).unbind(2)
    lists, normaliser = lists_of(n, m, block, tables, partial_blocks), normaliser or Normaliser()
    table = lists.by_query.count.shape[2], lists.by_key.count.shape[2]
    given = (lists, normaliser, empty(16, dtype=FULL) if sink else None)
    given += (empty(1, tables, *table, dtype=FULL) if bias else None,)
    if direction == "forward":
        kernels.forward(q, k, v, *given, descriptors)
        return
    row = empty(*q.shape[:3], dtype=FULL)
    of_rows = (row if lse else None, q, k, v, q, row, row)
    kernels.backward(torch.empty_like(q), *of_rows, *given, direction == "fast", descriptors)


def launches(direction: str, quick: bool = False, **options) -> dict[str, Launch]:
    """With descriptors for sm_90, with pointers for sm_80."""
    by_count = options.get("normaliser") in (RELU, RELU2)  # whose rows kernel reads one number of each row alone
    product = () if options.get("dtype") == FULL else ("HMMA",) if min(options.get("block", (64,))) < 64 else ("HGMMA",)
    with_descriptors = Launch(
        partial(attend, direction, **options), quick, (*product, *(() if not product else ("UTMALDG",))), ("sm_90",)
    )
    with_pointers = Launch(
        partial(attend, direction, **options, descriptors=False),
        quick,
        (*product, *(() if by_count else ("LDG.128",))),
        ("sm_80",),
    )
    return {"descriptors": with_descriptors, "pointers": with_pointers}


COVER: dict[str, dict] = {
    "forward": launches("forward", True),
    "forward of whole blocks": launches("forward", partial_blocks=0, sink=True),
    "forward 128 x 64": launches("forward", block=(128, 64), dtype=HALF),
    "forward 128 x 128 wide 64": launches(
        "forward", block=(128, 128), head_dim=64, normaliser=POLY, sink=True, tables=1
    ),
    "forward wide 72 ragged": launches("forward", head_dim=72, n=4001, m=3999, dtype=HALF, normaliser=RELU),
    "forward wide 80 biased": launches("forward", head_dim=80, bias=True, normaliser=POLY_E, tables=1),
    "forward 16 x 32 wide 32": launches("forward", block=(16, 32), head_dim=32, sink=True, shared=4),
    "forward float32": launches("forward", dtype=FULL, normaliser=RELU2, shared=2),
    "forward ragged": launches("forward", n=4001, m=3999, normaliser=POLY_CUT, shared=4),
    "backward": launches("backward", True),
    "backward of whole blocks": launches("backward", partial_blocks=0, sink=True, lse=True, head_dim=64),
    "backward 128 x 64": launches("backward", block=(128, 64), dtype=HALF, bias=True, tables=1),
    "backward 128 x 128 wide 64": launches("backward", block=(128, 128), head_dim=64, normaliser=POLY_E, sink=True),
    "backward wide 72 ragged": launches("backward", head_dim=72, n=4001, m=3999, normaliser=POLY, shared=2, lse=True),
    "backward 32 x 16 wide 32": launches("backward", block=(32, 16), head_dim=32, dtype=HALF, normaliser=RELU2),
    "backward float32 wide 64": launches("backward", dtype=FULL, head_dim=64, sink=True, lse=True),
    "fast": launches("fast", True),
    "fast biased": launches("fast", bias=True, normaliser=POLY),
    "fast 128 x 64 wide 64": launches("fast", block=(128, 64), head_dim=64, bias=True, normaliser=POLY_CUT),
    "fast wide 80 ragged": launches("fast", head_dim=80, dtype=HALF, n=4001, m=3999, shared=4, sink=True),
    "fast wide 32": launches("fast", head_dim=32, normaliser=RELU, tables=1),
    "fast float32 wide 32": launches("fast", dtype=FULL, head_dim=32, normaliser=POLY),
}
LAUNCHES = {f"{name}, {how}": launch for name, both in COVER.items() for how, launch in both.items()}
