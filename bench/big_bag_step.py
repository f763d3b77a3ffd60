"""Measure one training step of HMIL on a bag that stays in the store; print JSON.

A process of its own, so that its peak memory is that of this step:
`python -m bench.big_bag_step STORE SLIDE HIDDEN`.
"""

import json
import sys
import time
from pathlib import Path

import torch

from bench.one_bag_memory import resident
from hmil_fast.bags.stored import StoredBag
from hmil_fast.io.store import open_store
from hmil_fast.labels import LabelTree
from hmil_fast.losses import HmilLoss
from hmil_fast.models.hmil import HMIL

TREE = LabelTree.from_nested(
    {"benign": ["N", "PB", "UDH"], "atypical": ["FEA", "ADH"], "malignant": ["DCIS", "IC"]}
)


def main() -> None:
    folder, slide_id, hidden = sys.argv[1:]
    store = open_store(Path(folder))
    torch.manual_seed(0)
    model = HMIL(store.spec.dim, TREE.num_classes, hidden=int(hidden))
    loss = HmilLoss(TREE)
    optimizer = torch.optim.Adam(model.parameters())
    targets = torch.from_numpy(TREE.ancestors()).T[4:5]
    ready, begun = resident("VmRSS"), time.perf_counter()

    output = model.forward_chunks(StoredBag(store, slide_id))
    bags = torch.tensor([[0, len(output.attention_logits[0])]])
    forward = time.perf_counter() - begun
    terms = loss(output, bags, targets, 50, 200)
    terms.total.backward()
    optimizer.step()

    taken = {
        "instances": int(bags[0, 1]),
        "bag_bytes": int(bags[0, 1]) * store.spec.dim * store.spec.stored_dtype.itemsize,
        "extra_rss_bytes": resident("VmHWM") - ready,
        "seconds": time.perf_counter() - begun,
        "forward_seconds": forward,
        "terms": {name: float(term) for name, term in terms.terms.items()},
        "gradient": {name: float(p.grad.norm()) for name, p in model.named_parameters()},
    }
    print(json.dumps(taken))


if __name__ == "__main__":
    main()
