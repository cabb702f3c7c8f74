"Orthogonality: identities that hold for every matrix"
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn

from phantom_nb.plain import attach
from phantom_nb.regularizers.orthogonality import FORMS, Orthogonality, SquaredCosine, _start, orthogonality, squared_cosine

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
    for steps in (0, 1.5): # 2.0 is whole
        with pytest.raises(ValueError, match=f'steps={steps}'): orthogonality(torch.eye(3), 'spectral', steps=steps)
    assert orthogonality(torch.ones(3, 2), 'spectral', steps=2.)==orthogonality(torch.ones(3, 2), 'spectral')
    with pytest.raises(ValueError, match="no paper's"): SquaredCosine.paper()

def test_autocast_does_not_reach_in():
    w = torch.randn(64, 576)
    with torch.autocast('cpu', dtype=torch.bfloat16): e = squared_cosine(w)
    assert torch.equal(e, squared_cosine(w))

def test_soft_is_the_loop():
    w = torch.randn(5, 3, dtype=torch.float64)
    want = sum((a@b-float(i==j))**2 for i,a in enumerate(w) for j,b in enumerate(w))
    assert torch.isclose(orthogonality(w), want) and torch.isclose(orthogonality(w.T), want-2) # of shape (n,d), n-d more than of (d,n)
    with pytest.raises(ValueError, match="form='sofd'"): orthogonality(w, 'sofd')

def test_squared_cosine_is_the_loop():
    w = torch.randn(5, 3, dtype=torch.float64)
    u = w/w.norm(dim=1, keepdim=True)
    want = sum((a@b)**2 for i,a in enumerate(u) for j,b in enumerate(u) if i!=j)/(5*9)
    assert torch.isclose(squared_cosine(w), want)

def test_starts_are_drawn_anew_at_every_step():
    model,x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)),torch.randn(2, 4)
    with attach(model, Orthogonality(1., 'spectral', seed=3)) as penalty:
        for step in range(3):
            model(x)
            generator = torch.Generator().manual_seed(3+step)
            want = sum(orthogonality(m.weight, 'spectral', generator=generator) for m in (model[0], model[2]))
            assert torch.isclose(penalty(), want, rtol=1e-6)
    assert Orthogonality(seed=0).seed==0

def test_coherence_and_spectral_by_hand():
    "The largest entry off the identity; power iteration with exactly as many products as it is asked for"
    w = torch.randn(4, 6, dtype=torch.float64)
    m = w@w.T-torch.eye(4, dtype=w.dtype)
    assert torch.isclose(orthogonality(w, 'coherence'), m.abs().max())
    for steps in (1, 2, 3):
        v = _start(w, None)
        for _ in range(steps): v = m@(v/v.norm())
        assert torch.isclose(orthogonality(w, 'spectral', steps=steps), v.norm())

def test_squared_cosines_of_groups():
    w = torch.randn(3, 5, 4, dtype=torch.float64)
    assert torch.allclose(squared_cosine(w), torch.stack([squared_cosine(g) for g in w])) and squared_cosine(w).shape==(3,)

def test_the_penalty_moves_the_weights():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with attach(model, Orthogonality(1.)) as penalty:
        model(torch.randn(2, 4))
        penalty().backward()
    assert all(m.weight.grad.norm()>.1 for m in (model[0], model[2]))
