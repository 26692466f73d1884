import pytest

from lightning_compress import quantize
from lightning_compress.compressor import Compressor
from lightning_compress.methods.soft_threshold_rank import SoftThresholdRankConfig
from lightning_compress.nn.flops import count_bytes, count_flops, count_parameters
from lightning_compress.report.model_counts import DenseCounts, ranks_of
from tests.report.conftest import tiny_bert


def test_a_model_is_counted_against_the_dense_one():
    dense = tiny_bert()
    counts = DenseCounts.of(dense.to("meta"), [4, 8])
    assert counts.scopes.total == sum(p.numel() for p in dense.parameters()) and counts.lengths == (4, 8)
    assert (counts.size_ratio(dense), counts.flops_ratio(dense)) == (1.0, 1.0)
    half = tiny_bert(layers=1)
    assert counts.size_ratio(half) == 0.5 and 0.5 < counts.flops_ratio(half) < 0.51  # and the head


def test_what_became_of_it_is_told_with_bytes_and_ranks():
    compressor = Compressor(tiny_bert(), [SoftThresholdRankConfig(target_params=0.5, rank_multiple=4)])
    counts = DenseCounts.of(tiny_bert(), [6])
    compressor.prepare()
    compressor.convert()
    model = compressor.model
    final = counts.against(model, compressor.dense_skeleton())
    assert final.compressed.linear == count_parameters(model).linear <= 0.5 * final.dense.linear
    assert final.compressed_flops == count_flops(model, [6]).total < final.dense_flops == counts.flops
    assert final.bytes_on_disk == {"dense": count_bytes(tiny_bert()), "compressed": count_bytes(model)}
    assert {path: row.rank for path, row in final.ranks.items()} == ranks_of(model) != {}
    assert all(row.full_rank == 32 and row.kept == "low_rank" for row in final.ranks.values())


def test_flops_that_were_measured_come_first():
    final = DenseCounts.of(tiny_bert(), [6]).against(tiny_bert(), tiny_bert(), (10.0, 4.0))
    assert (final.dense_flops, final.compressed_flops) == (10.0, 4.0) and final.ranks == {}


@pytest.mark.parametrize(("preset", "times"), [("w8a8", 2.5), ("w4a8", 4.0)])
def test_fewer_bits_are_fewer_bytes_of_as_many_parameters(preset, times):
    counts, small = DenseCounts.of(tiny_bert(), [6]), quantize(tiny_bert(), preset)
    final = counts.against(small, tiny_bert())
    assert final.compressed == final.dense and final.bytes_on_disk is not None
    assert final.bytes_on_disk["dense"] > times * final.bytes_on_disk["compressed"]
