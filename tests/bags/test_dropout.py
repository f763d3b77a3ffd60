import pytest
import torch

from hmil_fast.bags.dropout import drop_features, drop_instances


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_a_share_is_dropped_everywhere_and_the_mean_stays(share: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(4001, 33, dtype=dtype)
    out = drop_features(x, share)
    assert isinstance(out, torch.Tensor)
    assert out.dtype == dtype
    dropped = (out == 0).float()
    assert dropped.mean().item() == pytest.approx(share, abs=0.01)
    assert dropped.mean(0).sub(share).abs().max() < 0.05  # no column is spared
    assert out.float().mean().item() == pytest.approx(1, abs=0.01)
    # the bytes of a word are drawn alike
    words = drop_features(torch.ones(4000, 8), share)
    assert isinstance(words, torch.Tensor)
    assert (words == 0).float().mean(0).sub(share).abs().max() < 0.04


def test_nothing_is_dropped_unless_asked_and_seeds_repeat() -> None:
    x = torch.randn(20, 5)
    assert drop_features(x, 0.0) is x
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(drop_features(x, 0.5))
    assert torch.equal(*drawn)
    assert not torch.equal(drop_features(x, 0.5), drawn[0])


def test_chunks_lose_the_same_at_every_reading() -> None:
    chunks = torch.split(torch.ones(30, 16), 12)
    torch.manual_seed(1)
    out = drop_features(chunks, 0.5)
    assert len(out) == 3
    first = [out[k] for k in range(3)]
    assert all(torch.equal(a, out[k]) for k, a in enumerate(first))
    assert not torch.equal(first[0], first[1])
    assert 0.3 < torch.cat(first).eq(0).float().mean() < 0.7


@pytest.mark.parametrize("share", [0.1, 0.5, 0.7])
def test_every_bag_keeps_some_of_its_own_instances(share: float) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([7, 0, 1, 1000, 3])
    bags = torch.stack([lengths.cumsum(0) - lengths, lengths], 1)
    x = torch.arange(int(lengths.sum()))[:, None]
    out, left = drop_instances(x, bags, share)
    assert isinstance(out, torch.Tensor)
    assert left[1:3, 1].tolist() == [0, 1]
    assert (left[[0, 4], 1] >= 1).all()
    assert left[3, 1].item() == pytest.approx(1000 * (1 - share), abs=60)
    assert left[:, 0].tolist() == (left[:, 1].cumsum(0) - left[:, 1]).tolist()
    for (start, n), (first, kept) in zip(bags.tolist(), left.tolist(), strict=True):
        own = out[first : first + kept, 0].tolist()
        assert len(set(own)) == kept
        assert set(own) <= set(range(start, start + n))
    assert len(out) == int(left[:, 1].sum())


def test_every_instance_is_left_out_as_often_as_any_other() -> None:
    torch.manual_seed(0)
    bags = torch.tensor([[0, 14], [14, 16]])
    x = torch.arange(30)[:, None]
    seen = torch.zeros(2000, 30)
    for one in seen:
        out, _ = drop_instances(x, bags, 0.5)
        assert isinstance(out, torch.Tensor)
        one[out[:, 0]] += 1
    assert (seen.mean(0) - 0.5).abs().max() < 0.05
    # one by one: those that a bag keeps are not always as many
    assert seen[:, :14].sum(1).var().item() == pytest.approx(14 / 4, rel=0.2)
    assert torch.corrcoef(seen.T).fill_diagonal_(0).abs().max() < 0.12


def test_no_bags_and_chunks_pass_as_they_are() -> None:
    none = torch.zeros(0, 2, dtype=torch.int64)
    out, left = drop_instances(torch.zeros(0, 3), none, 0.5)
    assert isinstance(out, torch.Tensor)
    assert (list(out.shape), list(left.shape)) == ([0, 3], [0, 2])
    chunks = torch.split(torch.ones(30, 16), 12)
    assert drop_instances(chunks, torch.tensor([[0, 30]]), 0.5)[0] is chunks
