"The monitor and the report on learners of all kinds: nothing of the training changes, wrong input is refused; the command"
import fastai.callback.schedule # chkstyle: ignore
import math
import matplotlib.pyplot, numpy as np, pytest, torch
from fastai.basics import Callback, DataLoaders, Learner, MSELossFlat, Transform
from fastai.callback.progress import ProgressCallback
from fastai.data.core import Datasets
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from phantom_nb.data import available, get_dls
from phantom_nb.measures.intraclass import IntraclassMonitor, capture, intraclass_report, sample_batches, variance_ratio
from phantom_nb.measures.intraclass import interpolation_drop, subclass_silhouette, unit_variance_ratio
from phantom_nb.models import create_model

matplotlib.use('agg')
needs_fashion = pytest.mark.skipif(not available().found['fashion_mnist'], reason='Fashion-MNIST is not here')

def learner(*cbs, coarse=True, dls=None, **kwargs):
    dls = dls or get_dls('digits', n_train=100, n_valid=20, coarse=coarse, augment=True, seed=0)
    learn = Learner(dls, create_model('small_cnn', n_out=2 if coarse else 10, size=8, seed=0), cbs=cbs, **kwargs)
    learn.logger,learn.create_mbar = (lambda *_: None),False
    return learn.remove_cb(ProgressCallback)

def weights(learn): return list(learn.model.state_dict().values())

@pytest.mark.parametrize('kw', [dict(), dict(interpolate=True, keep=True), dict(every=2, layers='stage3.*', c3=2)], ids=str)
def test_training_does_not_notice_the_monitor(kw):
    plain,watched = learner(),learner(IntraclassMonitor(n=50, **kw))
    for l in (plain, watched):
        torch.manual_seed(0)
        l.fit(3, 1e-2)
        l.rng = torch.rand(3)
    assert all(map(torch.equal, weights(plain), weights(watched))) and torch.equal(plain.rng, watched.rng)

def test_values_are_those_of_the_trained_network_on_its_sample():
    learn = learner(IntraclassMonitor(n=60, keep=True))
    learn.fit(2, 1e-2)
    mon = learn.intraclass_monitor
    df,(batches,idx) = mon.to_frame(),sample_batches(learn.dls.train, 60)
    y,sub = torch.cat([y for _,y in batches]),learn.dls.train_ds.fine[idx]
    assert torch.equal(y, learn.dls.train_ds.y[idx]) and torch.equal(mon.sublabels, sub)
    acts = capture(learn.model, batches)
    assert df.epoch.tolist()==[0,1,2] and df.c3.iloc[-1]==pytest.approx(variance_ratio(acts, y), rel=1e-6)
    assert df.c2.iloc[-1]==pytest.approx(subclass_silhouette(acts, y, sub), rel=1e-5)
    assert all(torch.equal(mon.acts[2][k], acts[k]) for k in acts) and not torch.equal(mon.acts[0]['stage3.1.relu'], mon.acts[2]['stage3.1.relu'])
    with torch.no_grad(): right = sum((learn.model.eval()(x).argmax(1)==y).sum().item() for x,y in batches)/60
    assert df.accuracy.iloc[-1]==pytest.approx(right)
    assert list(mon.profiles().xs(2).index)==[*acts,'network'] and len(mon.plot())==2

def test_sample_is_random_unaugmented_and_fixed():
    dls = get_dls('digits', n_train=300, augment=True, seed=0)
    (a,idx),(b,_) = sample_batches(dls.train, 40),sample_batches(dls.train, 40)
    assert all(torch.equal(x, z) for (x,_),(z,_) in zip(a, b)) and dls.train.epoch==0
    plain = dls.train.new(shuffle=False, bs=300).one_batch()[0][idx]
    assert torch.equal(torch.cat([x for x,_ in a]), plain)
    assert idx.max()>200 and not torch.equal(idx, sample_batches(dls.train, 40, seed=1)[1])

def test_sample_is_transformed_as_for_validation():
    class Augment(Transform):
        split_idx = 0
        def encodes(self, x): return x+100
    class Crop(Transform):
        split_idx = 1
        def encodes(self, x): return 2*x
    data = Datasets(range(20), [[lambda i: torch.tensor([float(i)]), Augment, Crop], [lambda i: i%2]], splits=[range(12),range(12,20)])
    batches,idx = sample_batches(data.dataloaders(bs=4).train, 6)
    assert torch.equal(torch.cat([x for x,_ in batches])[:,0], 2.*idx)

def test_c0_is_that_of_the_networks_probabilities():
    learn = learner(IntraclassMonitor(n=40, interpolate=True, seed=3))
    learn.fit(1, 1e-2)
    (batches,idx),model = sample_batches(learn.dls.train, 40, 3),learn.model.eval()
    x,y = [torch.cat(parts) for parts in zip(*batches)]
    with torch.no_grad():
        want = interpolation_drop(lambda x: model(x).softmax(1), x, y, learn.dls.train_ds.fine[idx], torch.Generator().manual_seed(3))
    assert learn.intraclass_monitor.to_frame().c0.iloc[-1]==pytest.approx(want, rel=1e-6)

def test_the_report_shows_the_unit_that_varies_most():
    learn = learner()
    fig = intraclass_report(learn, n=60)[1]
    batches,_ = sample_batches(learn.dls.train, 60)
    ratios = {layer:unit_variance_ratio(a, torch.cat([y for _,y in batches])) for layer,a in capture(learn.model, batches).items()}
    layer,most = max(ratios.items(), key=lambda item: item[1].max())
    titles = [fig.axes[2].get_title(loc) for loc in ('left','center')] # a style sets the place for all that follow
    assert f'unit {most.amax(0).argmax()} of {layer}, largest c3' in titles

def test_epochs_that_are_measured():
    learn = learner(IntraclassMonitor(n=30, every=2))
    learn.fit(5, 1e-3)
    assert learn.intraclass_monitor.to_frame().epoch.tolist()==[0,2,4,5]
    learn.fit(1, 1e-3)
    assert learn.intraclass_monitor.to_frame().epoch.tolist()==[0,1]
    learn.lr_find(num_it=12, show_plot=False)
    assert learn.intraclass_monitor.to_frame().epoch.tolist()==[0,1]

def test_two_monitors_have_names_of_their_own():
    learn = learner(IntraclassMonitor(n=30), IntraclassMonitor(n=50, layers='stage3.*'))
    learn.fit(1, 1e-2)
    assert len(learn.intraclass_monitor.profiles().xs(1))>len(learn.intraclass_monitor_2.profiles().xs(1))

def test_figures_have_a_panel_for_c0_and_a_legend():
    learn = learner(IntraclassMonitor(n=40, interpolate=True))
    learn.fit(1, 1e-2)
    axs = learn.intraclass_monitor.plot()
    shown = [t.get_text() for t in axs[0].figure.legends[0].get_texts()]
    assert len(axs)==3 and shown==['c1','c2','c3','c4','accuracy']
    assert len(learn.intraclass_monitor.plot(matplotlib.pyplot.subplots(1, 3)[1]))==3

def test_without_subclasses():
    learn = learner(IntraclassMonitor(n=50), coarse=False)
    learn.fit(1, 1e-2)
    assert list(learn.intraclass_monitor.to_frame())==['epoch','accuracy','c3','c4']
    table,fig = intraclass_report(learn, n=50)
    assert list(table)==['c3','c4'] and table.attrs['n']==50 and len(fig.axes)==3

def test_export_leaves_the_monitor_and_its_images_out(tmp_path):
    learn = learner(IntraclassMonitor(n=50))
    learn.path = tmp_path
    learn.fit(1, 1e-2)
    assert learn.intraclass_monitor._sample is None
    learn.export('a.pkl')
    exported = torch.load(tmp_path/'a.pkl', weights_only=False)
    assert not any(isinstance(cb, IntraclassMonitor) for cb in exported.cbs) and learn.intraclass_monitor.rows

def test_loaders_of_pytorch_and_frozen_batch_normalization():
    x,y = torch.randn(64, 1, 8, 8),torch.arange(64)%2
    dl = DataLoader(TensorDataset(x, y), 16, shuffle=True)
    learn = learner(IntraclassMonitor(n=40, subclass=np.arange(64)%4), dls=DataLoaders(dl, dl), loss_func=nn.CrossEntropyLoss())
    learn.fit(1, 1e-2)
    assert 'c2' in learn.intraclass_monitor.to_frame()

@pytest.mark.parametrize('kw,message', [(dict(n=1), 'n=1'), (dict(subclass=[1,2]), 'subclass has 2 labels for 100'), (dict(layers='fc'), "layers='fc'"),
    (dict(c9=2), 'c9')])
def test_refused_before_training(kw, message):
    learn = learner(IntraclassMonitor(**kw))
    before = [w.clone() for w in weights(learn)]
    with pytest.raises(ValueError, match=message): learn.fit(1, 1e-2)
    assert all(map(torch.equal, weights(learn), before))

def test_refused_at_once():
    with pytest.raises(ValueError, match='every=0'): IntraclassMonitor(every=0)
    with pytest.raises(ValueError, match='fit first'): IntraclassMonitor().plot()
    with pytest.raises(ValueError, match='interpolate=True needs subclasses'): learner(IntraclassMonitor(interpolate=True), coarse=False).fit(1)

def test_labels_that_are_no_classes():
    dl = DataLoader(TensorDataset(torch.randn(20, 1, 8, 8), torch.randn(20, 2)), 5)
    with pytest.raises(ValueError, match=r'labels are \(5, 2\) torch.float32: .* one class a sample'): intraclass_report(learner(dls=DataLoaders(dl, dl), loss_func=MSELossFlat()))


# phantom_nb measure

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    d = tmp_path_factory.mktemp('saved')
    for name,coarse in (('fine', False), ('coarse', True)):
        learn = learner(coarse=coarse)
        learn.path = d
        learn.fit(1, 1e-2)
        learn.export(f'{name}.pkl')
    torch.save(dict(a=1), d/'dict.pkl')
    (d/'text.pkl').write_text('hello')
    return d

def run(capsys, *args):
    "Exit status and what was printed"
    from phantom_nb.cli import main
    try: main(['measure', *map(str, args)])
    except SystemExit as e: return e.code or 0,' '.join(sum((o.split() for o in capsys.readouterr()), []))

def test_report_of_a_saved_learner(saved, capsys, tmp_path):
    code,out = run(capsys, saved/'fine.pkl', '--n', 100)
    assert code==0 and 'stage3.1.relu' in out and 'network' in out and 'c4' in out and 'c1' not in out
    assert (saved/'fine-layers.png').stat().st_size>1000
    code,out = run(capsys, saved/'coarse.pkl', '--n', 100, '--plot', tmp_path/'a.svg')
    assert code==0 and 'c1' in out and (tmp_path/'a.svg').exists() and not (saved/'coarse-layers.png').exists()

@pytest.mark.parametrize('args,message', [(['none.pkl'], 'no learner at'), (['dict.pkl'], 'cannot be opened as a learner'),
    (['text.pkl'], 'cannot be opened as a learner'), (['fine.pkl','--data','digit'], "did you mean 'digits'?"), (['fine.pkl','--n','4'], '4 training images: give 10'),
    (['fine.pkl','--n','1001'], '1001 training images: give 10 (one a class) to 100'), (['fine.pkl','--plot','a.txt'], "'a.txt': give a file name that ends in"),
    (['fine.pkl','--plot','no/a.png'], 'the folder does not exist'), pytest.param(['fine.pkl','--data','fashion_mnist'], 'trained on images of 1×8×8', marks=needs_fashion)])
def test_wrong_input_ends_in_one_sentence(saved, capsys, args, message):
    code,out = run(capsys, saved/args[0], *args[1:])
    assert code==2 and message in out and 'Traceback' not in out

def test_a_bare_network_is_no_learner():
    with pytest.raises(ValueError, match='a Linear is no learner'): intraclass_report(torch.nn.Linear(2, 2))

def test_a_fit_that_goes_on_is_filed_under_its_epochs():
    learn = learner(IntraclassMonitor(n=50))
    learn.fit(2, 1e-2)
    learn.fit(4, 1e-2, start_epoch=2)
    assert learn.intraclass_monitor.to_frame().epoch.tolist()==[2, 3, 4]
    learn.fit(1, 1e-2)
    assert learn.intraclass_monitor.to_frame().epoch.tolist()==[0, 1]

def test_a_network_that_breaks_ends_no_fit():
    "A row of NaN and a warning, and the training goes on"
    def spoil(cb):
        if cb.epoch==1:
            for p in cb.learn.model.parameters(): p.data.fill_(float('nan'))
    learn = learner(IntraclassMonitor(n=50))
    with pytest.warns(UserWarning, match='epoch 2 is not measured'): learn.fit(3, 1e-2, cbs=Callback(after_train=spoil))
    df = learn.intraclass_monitor.to_frame()
    assert df.epoch.tolist()==[0, 1, 2, 3] and df.c3.notna().tolist()==[True, True, False, False]

def test_a_search_that_was_interrupted_leaves_the_next_fit_alone():
    class Stop(Callback):
        def before_batch(self):
            if hasattr(self.learn, 'lr_finder'): raise KeyboardInterrupt
    mon = IntraclassMonitor(n=40)
    learn = Learner(get_dls('digits', n_train=60, n_valid=20, bs=20, device='cpu'), create_model('small_cnn', size=8), cbs=[mon, Stop()])
    with pytest.raises(KeyboardInterrupt), learn.no_bar(), learn.no_logging(): learn.lr_find(show_plot=False)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert [row['epoch'] for row in mon.rows]==[0,1]

def test_noisy_superclasses_have_no_subclasses():
    mon = IntraclassMonitor(n=40)
    learn = Learner(get_dls('digits', n_train=60, n_valid=20, bs=20, device='cpu', coarse=True, label_noise=.2), create_model('small_cnn', n_out=2, size=8), cbs=mon)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    last = mon.rows[-1]
    assert math.isfinite(last['c3']) and math.isfinite(last['c4']) and not any(math.isfinite(last.get(name, math.nan)) for name in ('c1','c2'))

def test_a_part_of_a_data_set_is_sampled_from_that_part():
    data = TensorDataset(torch.arange(60.)[:,None], torch.arange(60)%3)
    batches,idx = sample_batches(DataLoader(data, 8, sampler=SubsetRandomSampler(range(40, 60))), 30)
    assert idx.tolist()==list(range(40, 60)) and torch.cat([x for x,_ in batches]).flatten().tolist()==idx.tolist()
