"What may predict generalization, measured on one network: nothing of the training changes, and every number is the one of its own page"
import json
from dataclasses import replace

import pytest, torch

from phantom_nb.experiments import predictors
from phantom_nb.experiments.learner import make_learner
from phantom_nb.experiments.predictors import PredictorMonitor, cheap_predictors, clustering_predictors
from phantom_nb.experiments.predictors import dear_predictors, weights_of
from phantom_nb.experiments.run import Run
from phantom_nb.experiments.runner import train_run
from phantom_nb.measures.clustering import intraclass_table
from phantom_nb.measures.sharpness import sharpness
from phantom_nb.models import create_model

RUN = Run(data='digits', n_train=100, n_valid=20, coarse=True, epochs=3, test=True, bs=20)

def test_the_row_has_it_and_training_is_the_same():
    plain,traced = train_run(RUN, device='cpu'),train_run(RUN, device='cpu', trace='measures')
    assert traced['status']=='done', traced.get('error')
    assert plain['accuracy']==traced['accuracy'] and plain['train_loss']==traced['train_loss']
    trace = traced['trace']
    assert [point['epoch'] for point in trace['points']]==[1,2]
    final = trace['final']
    assert {'c0','c1_1','c2_1','c3_30','c4_1','sigma1','alpha2','distance','energy','sparsity','similarity','valid_loss'} <= set(final)
    assert final['train_accuracy']==pytest.approx(traced['train_accuracy'], abs=1e-5) and len(json.dumps(trace))<12_000
    assert trace['training']>0 and trace['measuring']>0

def test_clustering_is_that_of_its_page():
    gen = torch.Generator().manual_seed(0)
    acts = {name:torch.randn(60, 12, generator=gen) for name in 'ab'} | dict(dead=-torch.ones(60, 4))
    fine = torch.arange(60)%6
    found,layers = clustering_predictors(acts, fine%2, fine)
    table = intraclass_table(acts, fine%2, fine, c3=30)
    for name,column in dict(c1='c1_1', c2='c2_1', c3='c3_30', c4='c4_1').items(): assert found[column]==pytest.approx(table.loc['network',name])
    assert layers['c4'][2] is None and len(layers['c1'])==3
    assert set(clustering_predictors(acts, fine)[1])=={'c3','c4'}

def test_distance_and_mode():
    net = create_model('small_cnn', n_out=2, size=8, seed=0).train()
    gen = torch.Generator().manual_seed(0)
    batches = [(torch.randn(30, 1, 8, 8, generator=gen), torch.arange(30)%2)]
    start = weights_of(net)
    assert cheap_predictors(net, batches, start)['distance']==0 and net.training
    with torch.no_grad(): net.head.fc.weight += .1
    assert cheap_predictors(net, batches, start)['distance']==pytest.approx(.1*net.head.fc.weight.numel()**.5, rel=1e-4)
    assert set(dear_predictors(net, batches).values())=={None} # untrained: no sharpness, and no superclasses

def test_superclasses_change_the_network_and_the_name():
    coarse,fine = make_learner(RUN, device='cpu'),make_learner(Run(data='digits', n_train=100, epochs=1), device='cpu')
    assert coarse.dls.c==2 and fine.dls.c==10 and RUN.key!=Run(data='digits', n_train=100, n_valid=20, epochs=3, test=True, bs=20).key
    with pytest.raises(ValueError, match='coarse'): Run(coarse=1)

def test_ascent_by_signs_is_no_weaker_and_training_mode_leaves_no_trace():
    run = Run(data='digits', n_train=100, epochs=20, bs=20)
    learn = make_learner(run, device='cpu')
    learn.fit(run.epochs)
    monitor = PredictorMonitor()
    learn.add_cb(monitor)
    monitor.before_fit()
    batches = monitor.few[0]
    by_gradients = sharpness(learn.model, batches, worst=True, steps=20)
    by_signs = sharpness(learn.model, batches, worst=True, steps=20, signs=True)
    assert by_signs<1.2*by_gradients
    before,chance = {k:v.clone() for k,v in learn.model.state_dict().items()},torch.get_rng_state()
    values = [sharpness(learn.model, batches, worst=True, steps=10, signs=True, train_mode=True) for _ in range(2)]
    assert values[0]==values[1]>0 and torch.equal(chance, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())

def test_sharpness_in_the_precision_of_training():
    run = Run(data='digits', n_train=100, epochs=20, bs=20, coarse=True, precision='bf16')
    learn,seen = make_learner(run, device='cpu'),[]
    learn.fit(run.epochs)
    monitor = PredictorMonitor()
    learn.add_cb(monitor)
    monitor.before_fit()
    exact = monitor.final(draws=2)
    learn.model.register_forward_hook(lambda module, x, out: seen.append(out.dtype))
    short = monitor.final(bf16=True, draws=2)
    assert seen[0]==seen[-1]==torch.float32 and torch.bfloat16 in seen # the cheap measures, then sharpness, then c0
    for name in ('sigma1','sigma2'): assert short[name]==pytest.approx(exact[name], rel=.1) and short[name]>0
    assert {name:value for name,value in short.items() if name[:5] not in ('sigma','alpha')}=={name:value for name,value in exact.items() if name[:5] not in ('sigma','alpha')}

@pytest.mark.parametrize('precision', ['float32','bf16'])
def test_a_run_is_measured_as_it_was_trained(precision, monkeypatch):
    monkeypatch.setattr(predictors, 'dear_predictors', lambda *args, **options: options)
    row = train_run(replace(RUN, epochs=1, precision=precision), device='cpu', trace='measures')
    assert row['trace']['final']['bf16']==(precision=='bf16')
