"The one way to catch activations, and the one way to refuse a value"
from contextlib import ExitStack

import pytest, torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch import nn

from phantom_nb.checks import number, one_of, share, whole
from phantom_nb.hooks import catch, compiled_words, evaluating, is_compiled, unwrap


class Twice(nn.Module):
    "One module that is used twice, one function, one of them in place"
    def __init__(self):
        super().__init__()
        self.linear,self.act = nn.Linear(3, 3),nn.ReLU(inplace=True)
    def forward(self, x): return F.silu(self.act(self.linear(self.act(self.linear(x)))))

def n_hooks(model): return sum(len(m._forward_hooks)+len(m._forward_pre_hooks) for m in model.modules())

def test_calls_are_named_counted_and_keep_their_gradient():
    model,seen = nn.Sequential(Twice(), nn.ReLU()),[]
    with catch(model, {'0.act':model[0].act}, after=seen.append):
        for _ in range(2): model(torch.randn(4, 3))
    assert [c.name for c in seen]==['0.act','0.act:2']*2 and all(c.out.requires_grad for c in seen) and n_hooks(model)==0

def test_functions_are_named_by_the_module_that_calls_them():
    model,seen = nn.Sequential(Twice(), nn.SiLU()),[]
    with catch(model, functions={F.silu:'silu'}, after=seen.append): model(torch.randn(4, 3))
    assert [(c.name, type(c.module).__name__) for c in seen]==[('0.silu','Twice'), ('1','SiLU')]

def test_before_sees_what_an_in_place_function_overwrites():
    model,seen = Twice(),[]
    with catch(model, {'act':model.act}, before=lambda c: seen.append(c.x.detach().clone())): model(torch.randn(50, 3))
    assert all((x<0).any() for x in seen) and len(seen)==2

@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_hooks_go_after_errors_and_the_next_pass_is_named_afresh(error):
    model,seen = Twice(),[]
    def stop(call):
        seen.append(call.name)
        if len(seen)==1: raise error
    with pytest.raises(error), catch(model, {'act':model.act}, {F.silu:'silu'}, before=stop): model(torch.randn(2, 3))
    assert n_hooks(model)==0
    with catch(model, dict(act=model.act), {F.silu:"silu"}, before=stop): model(torch.randn(2, 3))
    assert seen[1:]==['act','act:2','silu']

def test_wrappers_are_looked_through():
    net = nn.Linear(2, 2)
    compiled = torch.compile(net)
    assert unwrap(nn.DataParallel(compiled)) is net and unwrap(torch.compile(nn.DataParallel(net))) is net
    assert is_compiled(nn.Sequential(compiled)) and not is_compiled(nn.Sequential(net))
    net.compile()
    assert is_compiled(nn.Sequential(net))

def test_compiled_code_is_said_to_call_no_hooks():
    assert compiled_words(nn.Linear(2, 2))=='' and 'train without compile' in compiled_words(nn.Sequential(torch.compile(nn.Linear(2, 2))))

class Starts(nn.Module):
    "Begins to watch the network that it is a part of"
    def __init__(self, start):
        super().__init__()
        self.start = start
    def forward(self, x):
        self.start()
        return F.silu(x)

def test_watching_may_begin_and_end_within_a_forward_pass():
    "Modules that were entered before are left without a word, and what comes behind has its name"
    seen = []
    with ExitStack() as stack:
        def start():
            if not seen: stack.enter_context(catch(model, {'0':model[0], '1':model[1]}, {F.silu:'silu'}, after=lambda c: seen.append((c.name, c.function))))
        model = nn.Sequential(Starts(start), nn.SiLU())
        for module in (model, model[0]): module.register_forward_hook(lambda *_: None) # else PyTorch looks for no hooks behind a forward pass
        model(torch.randn(2, 3))
        assert seen==[('silu','silu'), ('1:2','silu'), ('1','')]
        seen[1:] = []
        model(torch.randn(2, 3))
    assert seen[1:]==[('0:2','silu'), ('0',''), ('1:2','silu'), ('1','')] and n_hooks(model)==2

def test_a_function_outside_of_the_network_has_no_module_also_after_an_error():
    model,seen = nn.Sequential(Twice(), nn.SiLU()),[]
    with catch(model, functions={F.silu:'silu'}, after=lambda c: seen.append((c.name, c.module))):
        with pytest.raises(RuntimeError): model(torch.randn(4, 2)) # in the midst of it
        model(torch.randn(4, 3))
        F.silu(torch.randn(3))
    assert [name for name,_ in seen]==['0.silu','1','silu'] and seen[-1][1] is model

def test_calls_have_their_input_whether_by_place_or_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Linear(3, 3)
        def forward(self, x): return F.silu(input=self.part(input=x))
    model,x,seen = Named(),torch.randn(4, 3),[]
    def look(call): seen.append((call.name, call.function, call.x, call.out))
    with catch(model, {'part':model.part}, {F.silu:'silu'}, before=look, after=look): out = model(x)
    assert [s[:2] for s in seen]==[('part',''), ('part',''), ('silu','silu'), ('silu','silu')]
    assert seen[0][2] is x and seen[0][3] is None and seen[2][2] is seen[1][3] and seen[2][3] is None and seen[3][3] is out

def test_evaluating_restores_each_mode_after_an_error():
    model = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.Dropout())
    with pytest.raises(ValueError), evaluating(nn.DataParallel(model)) as inside:
        assert inside is model and not any(m.training for m in model.modules()) and not torch.is_grad_enabled()
        raise ValueError
    assert [m.training for m in model.modules()]==[True,False,True] and torch.is_grad_enabled()


@given(st.one_of(st.floats(allow_nan=True), st.integers(-5, 5), st.booleans(), st.text(max_size=3), st.none()))
def test_number_returns_what_is_in_range_and_names_what_is_not(v):
    good = not isinstance(v, bool) and isinstance(v, (int,float)) and 0<v<=1
    if good: assert number('alpha', v, above=0, at_most=1)==v
    else:
        with pytest.raises(ValueError) as e: number('alpha', v, above=0, at_most=1)
        assert str(e.value)==f"alpha={v!r}: give a number in (0, 1]"

@pytest.mark.parametrize('v,ok', [(1,True), (3.,True), (2.5,False), (0,False), (True,False), ('3',False), (float('inf'),False)])
def test_whole(v, ok):
    if ok: assert whole('k', v)==int(v) and isinstance(whole('k', v), int)
    else:
        with pytest.raises(ValueError, match="give a whole number >= 1"): whole('k', v)

def test_one_of_guesses_and_share_is_open():
    with pytest.raises(ValueError, match=r"over='sample' \(did you mean 'samples'\?\): give one of units, samples"): one_of('over', 'sample', ('units','samples'))
    for v in (0, 1, -.1): pytest.raises(ValueError, share, 'level', v)
    assert share('level', .95)==.95
