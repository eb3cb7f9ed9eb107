"""Pack sequences into a layout by hand, so that models and kernels are tested without an engine."""

import torch

from penstock.kernels import BatchLayout


def layout_of(
    query_lens: list[int],
    context_lens: list[int],
    tables: list[list[int]],
    block_size: int,
    starts: list[int] | None = None,
) -> BatchLayout:
    """Return the layout of sequences whose tables begin at token ``starts`` (all zero by default)."""
    starts = starts or [0] * len(tables)
    width = max(map(len, tables))
    positions, slots = [], []
    for query, context, table, start in zip(query_lens, context_lens, tables, starts, strict=True):
        for position in range(context - query, context):
            positions.append(position)
            slots.append(table[(position - start) // block_size] * block_size + (position - start) % block_size)
    query_starts = [0]
    for query in query_lens:
        query_starts.append(query_starts[-1] + query)
    return BatchLayout(
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        query_starts=torch.tensor(query_starts, dtype=torch.int32),
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        tables=torch.tensor([table + [-1] * (width - len(table)) for table in tables], dtype=torch.int32),
        table_starts=torch.tensor(starts, dtype=torch.int32),
        query_lens_list=query_lens,
        context_lens_list=context_lens,
        block_size=block_size,
    )
