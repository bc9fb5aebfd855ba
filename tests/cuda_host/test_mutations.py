"""Every mutation has its place in the sources; running `mutations` measures whether the tests catch it."""

from __future__ import annotations

import pytest

from tests.cuda_host.mutations import MUTATIONS, Mutation, apply


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_changes_its_file(mutation: Mutation, tmp_path):
    copy = apply(mutation, tmp_path / "overlay") / mutation.file
    assert mutation.after in copy.read_text()
