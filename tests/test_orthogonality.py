"Orthogonality: identities that hold for every matrix"
import pytest, torch
from hypothesis import given, settings, strategies as st

from phantom_nb.regularizers.orthogonality import FORMS, Orthogonality, orthogonality

sizes = st.integers(1, 8)

@settings(max_examples=30, deadline=None)
@given(n=sizes, d=sizes)
def test_double_is_soft_twice(n, d):
    w = torch.randn(n, d, dtype=torch.float64)
    soft = (w@w.T-torch.eye(n, dtype=w.dtype)).square().sum()
    columns = (w.T@w-torch.eye(d, dtype=w.dtype)).square().sum()
    assert torch.allclose(orthogonality(w), soft) and torch.allclose(orthogonality(w, 'double'), soft+columns)

@settings(max_examples=30, deadline=None)
@given(n=sizes, d=sizes, steps=st.integers(1, 5))
def test_power_iteration_comes_from_below_and_rises(n, d, steps):
    w = torch.randn(n, d, dtype=torch.float64)
    norm = torch.linalg.matrix_norm(w@w.T-torch.eye(n, dtype=w.dtype), 2)
    fewer,more = [orthogonality(w, 'spectral', steps=s) for s in (steps, steps+3)]
    assert fewer<=more+1e-9 and more<=norm+1e-9

@pytest.mark.parametrize('form', FORMS)
def test_groups_add_up_and_steps_share_a_start(form):
    w = torch.randn(3, 4, 6, dtype=torch.float64)
    if form!='spectral': assert torch.allclose(orthogonality(w, form), sum(orthogonality(g, form) for g in w))
    assert torch.equal(orthogonality(w, form), orthogonality(w, form))

def test_refusals():
    with pytest.raises(ValueError, match="did you mean 'spectral'"): Orthogonality(form='spectrl')
    with pytest.raises(ValueError, match='power_steps=0'): Orthogonality(power_steps=0)
