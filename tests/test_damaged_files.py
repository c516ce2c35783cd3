"""Readers of files that are damaged at random; `scripts/fuzz_readers.py` does the same with many more."""

import pytest
from reader_fuzzing import READERS, fuzz

pytestmark = pytest.mark.slow

MUTATIONS = 14


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_gives_a_result_or_one_clear_error(reader, tmp_path):
    outcome = fuzz(reader, range(MUTATIONS), seed=1, folder=tmp_path)
    assert not outcome.failures, "\n".join(outcome.failures)
    assert outcome.read + outcome.refused == MUTATIONS and outcome.refused > 0
