"Methods in ways of training: a sample of the recorded matrix is run again, every way with some methods"
import math
import pandas as pd, pytest, torch
from test_project import ROOT

from phantom_nb.core import Regularizer
from phantom_nb.experiments import compatibility as this
from phantom_nb.experiments.compatibility import NETWORKS, WAYS, compatibility, monitor_outcomes, regularizer_names
from phantom_nb.experiments.methods import METHODS, Method, Pieces
from phantom_nb.regularizers.hyperspherical import MHE

RECORDED = pd.read_json(ROOT/'results/compatibility.jsonl', lines=True)
SAMPLE = 'none','half_mhe','phantom','targeted_sparsity','sam','isda','gradient_penalty','normalize_project'
EXTRAS = {'Lightning':'lightning', 'Accelerate':'accelerate', 'HF Trainer':'transformers', 'timm CNN':'timm', 'EfficientNet':'timm',
    'ConvNeXt':'timm', 'ViT':'timm'}

@pytest.fixture
def method(monkeypatch):
    "Put a method of one class into the table for one test."
    def add(cls):
        monkeypatch.setitem(METHODS, 'made_up', Method('made up', {}, lambda: Pieces(cbs=(cls(),))))
        return 'made_up'
    return add

def outcomes(df): return {(row.method, row.way):row.outcome for row in df.itertuples()}

def test_everything_is_recorded_and_nothing_is_broken():
    assert set(zip(RECORDED.method, RECORDED.way))=={(m, w) for m in regularizer_names() for w in WAYS}
    assert set(RECORDED.outcome)<={'works','refused','no effect'}
    works = RECORDED[RECORDED.outcome=='works']
    assert (works.change>this.FELT).all() and works.change.map(math.isfinite).all()
    assert (RECORDED[RECORDED.outcome=='refused'].why.str.len()>20).all()

@pytest.mark.parametrize('way', [way for way in WAYS if way!='DDP'])
def test_the_record_is_what_comes_out(way):
    if way in EXTRAS: pytest.importorskip(EXTRAS[way])
    torch._dynamo.reset() # networks that other tests compiled count towards one limit
    df = compatibility(SAMPLE, [way])
    plain,rest = df[df.method=='none'],df[df.method!='none']
    assert plain.change.tolist()==[0.], 'plain training differs from itself: chance would look like an effect'
    assert outcomes(rest).items()<=outcomes(RECORDED).items(), rest

@pytest.mark.processes
def test_two_processes():
    df = compatibility(['none','half_mhe','phantom','sam','normalize_project'], ['DDP'])
    assert df.change[0]==0 and outcomes(df[1:]).items()<=outcomes(RECORDED).items(), df

def test_a_way_is_what_it_says():
    "bf16 trains to other weights than float32, accumulation takes half the steps, a frozen body stays"
    def ends(way, *cbs): return this._seeded(WAYS[way].train, cbs)[1]
    plain = ends('float32')
    assert not torch.equal(ends('bf16'), plain) and not torch.equal(ends('accumulation'), plain)
    start,model = WAYS['frozen body'].train(())
    convolution = model[0].weight.numel()
    assert torch.equal(start[:convolution], model[0].weight.detach().flatten())
    torch.testing.assert_close(ends('plain loop'), plain)
    torch.testing.assert_close(ends('Lightning'), plain) if 'Lightning' in WAYS else None

def test_what_does_nothing_or_breaks_is_found(method):
    class Silent(Regularizer):
        "A penalty without a gradient."
        def penalty(self): return torch.zeros(())
    class Breaks(Regularizer):
        "An error of its own."
        def penalty(self): raise RuntimeError('in the middle')
    class Endless(Regularizer):
        "A penalty that is not finite."
        def penalty(self): return next(self.model.parameters()).sum()*math.inf
    class Leaves(MHE):
        "A hook that stays."
        def open(self): self.model.register_forward_hook(lambda *args: None)
    found = {cls.__name__:compatibility([method(cls)], ['float32']).outcome[0] for cls in (Silent, Breaks, Endless, Leaves)}
    assert found==dict(Silent='no effect', Breaks='broken', Endless='broken', Leaves='broken')

def test_names_are_checked():
    with pytest.raises(ValueError, match='half_mhe'): compatibility(['halfmhe'], ['float32'])
    with pytest.raises(ValueError, match='float32'): compatibility(['mhe'], ['float23'])

def test_monitors_see_every_network_and_only_look():
    pytest.importorskip('timm')
    df = monitor_outcomes(NETWORKS)
    refused = df[df.why!='']
    assert list(zip(refused.monitor, refused.network))==[('IntraclassMonitor', 'table')]
    rest = df[df.why=='']
    assert (rest['rows']>0).all() and rest.same.all(), df
