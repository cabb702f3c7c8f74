"The diagnosis of a trained network: rules, bands, the page, the command"
import json, math, re, time
from dataclasses import replace
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from fastai.basics import Learner
from test_project import ROOT
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

from phantom_nb.cli import app
from phantom_nb.data import get_dls
from phantom_nb.experiments.diagnose import BANDS, BY_LAYER, DEPTHS, LEVELS, QUANTITIES, best_temperature, diagnose, judge_network, load_bands
from phantom_nb.experiments.diagnose import confused_pairs, layer_bands, layer_depths, percentile_in, reference_bands
from phantom_nb.experiments.diagnosis_page import diagnosis_html, panels_of, save_diagnosis
from phantom_nb.experiments.learner import make_learner
from phantom_nb.experiments.run import Run
from phantom_nb.experiments.store import load_results
from phantom_nb.models import create_model

def loaders(n=120, classes=4, size=16):
    gen = torch.Generator().manual_seed(0)
    y = torch.arange(n)%classes
    x = torch.randn(n, 3, size, size, generator=gen)+y[:,None,None,None]
    return DataLoader(TensorDataset(x, y), 32),DataLoader(TensorDataset(x.flip(3), y), 32)

@pytest.fixture(scope='module')
def trained():
    learn = make_learner(Run(epochs=8, n_train=200, n_valid=200), device='cpu')
    learn.fit(8)
    return learn

def test_any_network_and_loader(trained):
    "A torchvision network, never seen here: measured, and its mode and hooks put back"
    from torchvision.models import resnet18
    model = resnet18(num_classes=4)
    found = diagnose(model, *loaders(), classes=['a','b','c','d'])
    assert model.training and not any(m._forward_hooks for m in model.modules())
    assert {'accuracy','loss','n'}<=found.train.keys() and len(found.weights)>10 and str(found)

def test_a_learner_is_not_changed(trained):
    before = [p.clone() for p in trained.model.parameters()]
    found = diagnose(trained)
    assert all(torch.equal(a, b) for a,b in zip(before, trained.model.parameters()))
    assert found.valid['n']==200 and found.n_train==200
    assert str(diagnose(trained))==str(found)

def test_the_page_holds_everything_in_itself(trained, tmp_path):
    found = diagnose(trained, title='<b>mine</b>')
    page,picture = save_diagnosis(found, tmp_path/'deep'/'page.html')
    text = page.read_text(encoding='utf-8')
    assert '<b>mine</b>' not in text and not re.findall(r'(?:src|href)="(?!data:)', text)
    assert text.count('<img alt="')==len(panels_of(found)) and len(text)<1_500_000 and picture.stat().st_size>1000

def test_bare_numbers_have_their_kind_before_them_and_lost_curves_are_named():
    "A network of numbered layers, and of one with a name"
    inner = nn.Sequential(nn.Flatten(), nn.Linear(768, 8))
    model = nn.Sequential(inner, nn.ReLU(), nn.Linear(8, 4))
    found = diagnose(model, *loaders(), classes=list('abcd'))
    assert 'Linear 0.1' in found.weights.index and 'ReLU 1' in found.activations.index, (found.weights.index, found.activations.index)
    named = diagnose(nn.Sequential(model, nn.Identity()), *loaders(), classes=list('abcd'))
    assert 'Linear 0.0.1' in named.weights.index
    lost = 'Losses by epoch are not drawn'
    assert lost in diagnosis_html(found)
    curves = pd.DataFrame(dict(train_loss=[1.,.5], valid_loss=[1.,.6], accuracy=[.5,.6]))
    assert lost not in diagnosis_html(diagnose(model, *loaders(), classes=list('abcd'), curves=curves))

@pytest.mark.parametrize('held, word', [(.375, 'worse by 29.2 points'), (.66, 'would hold it back')])
def test_a_network_that_does_not_fit_trains_longer_whatever_the_gap(trained, held, word):
    found = diagnose(trained)
    found.train |= dict(accuracy=.667)
    found.valid |= dict(accuracy=held, n=400)
    first = next(f for f in judge_network(found) if 'Accuracy is 66.7 %' in f.fact)
    assert 'train longer' in first.advice and word in first.advice and 'over-fits' not in first.advice

def test_a_bump_that_is_over_is_no_over_fitting(trained):
    "A few bad epochs early on, and a loss that still falls at the end"
    from phantom_nb.experiments.diagnose import onset_of
    loss = [1.47, 1.39, 1.32, 8.4, 6.6, 3.1, 2.2, 1.8, 1.6, 1.5, 1.45, 1.42, 1.4, 1.3, 1.2]
    curves = pd.DataFrame(dict(train_loss=loss, valid_loss=loss, accuracy=[.5]*15))
    found = diagnose(trained, curves=curves)
    assert onset_of(found) is None and any('did not rise for good in 15 epochs' in f.fact for f in found.findings)

def saved_again(learn, path):
    from phantom_nb.experiments.learner import open_learner
    learn.export(path)
    return open_learner(path)

def test_a_report_counts_the_images_that_trained(tmp_path):
    "50 of 1,000 images were held out, so 60 images trained of the 1,437 there are"
    from phantom_nb.experiments.learner import loaders_for
    opened = saved_again(make_learner(Run(model='small_cnn', n_train=60, n_valid=50), device='cpu'), tmp_path/'learner.pkl')
    assert loaders_for(opened, 'digits').train_ds.n_pool==60==len(loaders_for(opened, 'digits').train_ds)
    with pytest.raises(ValueError, match=re.escape('61 training images: give 10 (one a class) to 60')): loaders_for(opened, 'digits', 61)
    out = CliRunner().invoke(app, ['report', str(tmp_path/'learner.pkl'), '--data', 'digits']).output
    assert '60 training images' in (tmp_path/'learner.html').read_text(encoding='utf-8'), out

def sorted_batch(dl):
    "All images as the network gets them, in an order that does not depend on the loader"
    x = torch.cat([x for x,_ in dl.new(shuffle=False, augment=None)]).flatten(1).double()
    return x[(x@torch.linspace(.1, 1, x.shape[1], dtype=torch.float64)**.5).argsort()]

@pytest.mark.parametrize('options', [dict(n_valid=40), dict(n_train=60, n_valid=50, seed=3), dict(imbalance=5., seed=1),
    dict(n_train=100, seed=0, split_seed=7), dict(n_train=60, stats=((.5,), (.25,))), dict(n_train=40, coarse=True, seed=2)])
def test_a_saved_learner_is_looked_at_with_its_own_images(options, tmp_path):
    "Whatever its seeds, split and normalization, the images of the report are those it was trained on, bit by bit"
    from phantom_nb.data import get_dls
    from phantom_nb.experiments.learner import loaders_for
    dls = get_dls('digits', device='cpu', **options)
    seen = loaders_for(saved_again(Learner(dls, create_model('small_cnn', size=8, n_out=dls.c)), tmp_path/'l.pkl'), 'digits')
    if len(dls.train_ds)<1000: assert torch.equal(sorted_batch(seen.train), sorted_batch(dls.train))
    else: assert len(seen.train_ds)<=1000 and seen.train_ds.n_pool==len(dls.train_ds)
    assert torch.equal(sorted_batch(seen.test), sorted_batch(dls.test)) and seen.vocab==dls.vocab

def photos_in(folder, classes='ab', n=12):
    "Noisy images of one colour a class"
    from PIL import Image
    gen = np.random.default_rng(0)
    for i,name in enumerate(classes):
        (folder/name).mkdir(parents=True)
        for k in range(n): Image.fromarray((gen.random((16,16,3))*99+i*99).astype('uint8')).save(folder/name/f'{k:02d}.png')
    return folder

def test_a_learner_with_transforms_of_its_own_is_refused(tmp_path):
    "Its file does not say which images it held out, and a guess at its pipeline gave a wrong accuracy"
    from fastai.vision.all import ImageDataLoaders, Resize
    folder = photos_in(tmp_path/'photos')
    dls = ImageDataLoaders.from_folder(folder, valid_pct=.3, item_tfms=Resize(16), bs=4)
    Learner(dls, create_model('small_cnn', 3, 2, 16), loss_func=nn.CrossEntropyLoss()).export(tmp_path/'l.pkl')
    for command in ('report','measure'):
        out = CliRunner().invoke(app, [command, str(tmp_path/'l.pkl'), '--data', str(folder)])
        said = ' '.join(str(out.exception).split())
        assert 'transforms of its own (Resize' in said and 'diagnose(learn)' in said, (out.output, said)
    assert not list(tmp_path.glob('*.html'))

def test_other_classes_and_other_images_are_refused(tmp_path):
    from phantom_nb.data import get_dls
    from phantom_nb.experiments.learner import loaders_for
    folder,other = photos_in(tmp_path/'photos'),photos_in(tmp_path/'other', 'bc')
    dls = get_dls(folder, size=16, bs=8, device='cpu')
    learn = saved_again(Learner(dls, create_model('small_cnn', 3, 2, 16)), tmp_path/'l.pkl')
    assert torch.equal(sorted_batch(loaders_for(learn, str(folder)).train), sorted_batch(dls.train))
    with pytest.raises(ValueError, match='trained on the classes a, b; other has b, c: give --data'): loaders_for(learn, str(other))
    for name in 'ab': (folder/name/'05.png').unlink()
    with pytest.raises(ValueError, match='had 20 when the network was trained'): loaders_for(learn, str(folder))

def test_curves_say_when_over_fitting_begins(trained):
    "Losses with a turn at the fifth epoch, and accuracy: the page marks the epoch that the sentence names"
    from phantom_nb.experiments.diagnose import onset_of
    from phantom_nb.experiments.diagnosis_page import draw_curves
    loss = [2, 1.5, 1.1, .9, .8, .85, .95, 1.05, 1.2, 1.3, 1.4, 1.5]
    curves = pd.DataFrame(dict(train_loss=[v/2 for v in loss], valid_loss=loss, accuracy=[.5]*12))
    found = diagnose(trained, curves=curves)
    assert onset_of(found)==5 and any('lowest at epoch 6 of 12' in f.fact for f in found.findings) # the mean of five, off by one here
    fig,ax = plt.subplots()
    draw_curves(ax, found)
    assert 'onset: 6' in [text.get_text() for text in ax.get_legend().get_texts()] and len(fig.axes)==2
    assert onset_of(diagnose(trained, curves=curves.assign(valid_loss=sorted(loss, reverse=True)))) is None
    plt.close(fig)

def test_a_learners_accuracy_is_read_from_its_record():
    from fastai.metrics import accuracy, error_rate
    learn = make_learner(Run(epochs=2, n_train=100, n_valid=100), device='cpu')
    learn = Learner(learn.dls, learn.model, metrics=[error_rate, accuracy])
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    curves = diagnose(learn).curves
    assert list(curves)==['train_loss','valid_loss','accuracy'] and curves.accuracy.tolist()==[row[3] for row in learn.recorder.values]

def test_few_images_make_few_points_of_calibration(trained):
    "Ten images a point at least, and an interval even where all answers are right"
    from phantom_nb.experiments.diagnosis_page import draw_calibration
    found = diagnose(trained)
    for n,points in ((18, 1), (45, 4), (200, 8)):
        y = torch.arange(n)%10
        found.valid |= dict(logits=5*torch.eye(10)[y]+torch.arange(n)[:,None]/n*torch.eye(10)[y], y=y, n=n)
        fig,ax = plt.subplots()
        draw_calibration(ax, found)
        bars = ax.containers[0][2][0].get_segments()
        assert len(bars)==points and all(bar[0,1]<.9 and bar[1,1]==pytest.approx(1) for bar in bars)
        assert ax.get_ylim()[0]<min(bar[0,1] for bar in bars)
        plt.close(fig)

def test_similar_classes_are_shown(trained):
    found = diagnose(trained)
    cosines = found.valid['cosines']
    assert cosines.shape==(10, 10) and cosines.diagonal().isnan().all() and torch.allclose(cosines.nanmean(), torch.tensor(found.quantities['similarity']), atol=1e-5)
    assert {'similarity','norms'}<=panels_of(found).keys()

@pytest.mark.processes # alone, for its time
def test_under_a_minute_for_resnet18():
    start = time.perf_counter()
    found = diagnose(create_model('resnet18', n_in=3, n_out=4, size=32), *loaders(1000, size=32))
    diagnosis_html(found)
    assert time.perf_counter()-start<60

@pytest.mark.parametrize('T', [.5, 1., 3.])
def test_temperature_is_found(T):
    gen = torch.Generator().manual_seed(1)
    z = 2*torch.randn(5000, 6, generator=gen)
    y = torch.multinomial(z.softmax(1), 1, generator=gen)[:,0]
    assert best_temperature(T*z, y)==pytest.approx(T, rel=.1)

def test_percentiles():
    band = [0, 0, 0, 0, 1, 2, 3, 4, 9]
    assert percentile_in(band, -1)==0 and percentile_in(band, 99)==100 and percentile_in(band, 2)==75
    assert percentile_in(band, 0)==12.5 # half of the networks that share the value

def test_bands_of_the_package_are_those_of_the_rows():
    "The rows give the file again; quantiles rise, every quantity is there at every depth, and groups are chosen by size"
    table = json.loads((ROOT/'phantom_nb'/BANDS).read_text())
    rows = pd.concat([load_results(path) for path in sorted((ROOT/'results').glob('*.jsonl')) if b'net_c3' in path.read_bytes()])
    assert reference_bands(rows)==table and len(table)==5
    for told in table.values():
        assert told['networks']>=told['layers']['networks']>=20 and told['settings']
        by_layer = [told['layers'][q] for q in BY_LAYER]
        assert all(bands.keys()==DEPTHS.keys() for bands in by_layer)
        bands = [*(told[q] for q in QUANTITIES), *(band for bands in by_layer for band in bands.values())]
        assert all(len(band)==len(LEVELS) and sorted(band)==band for band in bands)
    few,many,small,large = 'up to 300 images', '300 to 3,000 images', 'up to 300,000 parameters', 'more than 300,000 parameters'
    for n,params,group in ((200, 20_000, (few, small)), (200, 11_000_000, (few, large)), (1000, 11_000_000, (many, large))):
        assert load_bands(n, params)['group']==', '.join(group)

def test_a_band_needs_twenty_networks():
    row = dict(status='done', key='k', data='d', model='m', n_train=1000, params=1e6, label_noise=0., train_accuracy=1., valid_accuracy=.6,
        valid_ece=.2, valid_similarity=.5, valid_margin=.1, net_energy=1., net_sparsity=.3, net_dead=0., net_c3=1.2, net_c4=1.5, net_norm=100.)
    few = pd.DataFrame([row|dict(key=str(i)) for i in range(19)])
    assert reference_bands(few)=={}
    many = pd.DataFrame([row|dict(key=str(i), valid_accuracy=.5+i/1000) for i in range(100)])
    told, = reference_bands(many).values()
    assert told['networks']==60 and told['gap'][0]>told['gap'][-1]-.1
    assert reference_bands(many.assign(imbalance=20.))=={}==reference_bands(many.assign(label_noise=.4)) # made harder on purpose
    assert reference_bands(many.assign(imbalance=math.nan)).keys()==reference_bands(many).keys()
    tested = many.assign(accuracy=many.valid_accuracy, valid_accuracy=math.nan, ece=.3, valid_ece=math.nan)
    again, = reference_bands(tested).values()
    assert again['gap']==told['gap'] and set(again['ece'])=={.3} # judged on test images
    sizes = reference_bands(many.assign(params=[1e4]*50+[1e7]*50, model=['small']*50+['large']*50))
    assert list(sizes)==[f'300 to 3,000 images, {size} parameters' for size in ('up to 300,000', 'more than 300,000')]
    assert all(told['networks']==50 for told in sizes.values())

    assert reference_bands(many.assign(coarse=True))==reference_bands(many.assign(train_accuracy=.8))=={} # another task; not fitted

def test_layers_are_compared_by_depth():
    "Ten layers: first, last, and thirds; a layer of the same depth counts, whatever its number"
    assert layer_depths(10)==['first',*['early']*3,*['middle']*2,*['late']*3,'last']
    rows = pd.DataFrame(dict(data='d', n_train=100, net_layers=[dict(sparsity=[i/100, *[.5]*(1+i%2), None if i<5 else i/10]) for i in range(30)]))
    told = layer_bands(rows)
    assert told['networks']==30 and told['settings']==['d, 100 images'] and told['sparsity'].keys()=={'first','last'} and told['energy']=={}
    assert told['sparsity']['first'][4]==.145 and told['sparsity']['last'][4]==1.7 # without layers that are dead
    assert layer_bands(rows[:19])==layer_bands(rows.drop(columns='net_layers'))=={}

def test_layers_outside_of_their_band_are_named(trained):
    found = diagnose(trained)
    assert found.places('sparsity').value.tolist()==found.activations.sparsity.tolist() and len(found.places('norm'))==5
    usual = {depth:[0, 0, 0, .2, .4, .6, 1, 1, 1] for depth in DEPTHS}
    def among(**bands): return replace(found, bands=found.bands|dict(layers=dict(networks=33, settings=['s'])|bands))
    assert among(sparsity=usual).outside('sparsity')==[]
    last = among(sparsity=usual|dict(last=[.9]*4+[.95]*4+[1]))
    sentence, = last.outside('sparsity')
    assert sentence.startswith('stage3.1.relu (the last layer) is denser than 9 in 10 recorded networks: ') and sentence.endswith('0.900 to 0.950 (33 networks).')
    assert sentence not in [f.fact for f in judge_network(last)] and sentence in diagnosis_html(last) # one in five is usual
    two = among(sparsity=usual|dict(last=[.9]*9, late=[-.2]*9))
    assert any(f.fact in two.outside('sparsity') and f.advice.startswith('2 of 5') for f in judge_network(two))
    assert 'is sparser than 9 in 10 layers at this depth' in ' '.join(two.outside('sparsity')) and two.outside('energy')==[]
    assert diagnosis_html(replace(found, bands={})).count('No recorded layers')==4

def test_confusions_name_pairs_once():
    y = torch.tensor([0]*10+[1]*10+[2]*10)
    guess = y.clone()
    guess[:3],guess[10:12] = 1,0
    pair, = confused_pairs(nn.functional.one_hot(guess, 3).float(), y, ['a','b','c'])
    assert (pair.one, pair.other, pair.mistakes, pair.images)==('a', 'b', 5, 20)

@pytest.mark.parametrize('wrong,told', [(dict(classes=['a']), 'classes='), (dict(n=1), 'n=1'), (dict(n_train=0), 'n_train=0')])
def test_wrong_values_are_refused(wrong, told):
    with pytest.raises(ValueError, match=told): diagnose(create_model('small_cnn', n_in=3, n_out=4, size=16), *loaders(), **wrong)

def test_the_command_writes_a_page(trained, tmp_path):
    trained.export(tmp_path/'digits.pkl')
    done = CliRunner().invoke(app, ['report', str(tmp_path/'digits.pkl'), '--n-train', '200'])
    assert done.exit_code==0, done.output
    assert 'Accuracy is' in done.output and (tmp_path/'digits.html').exists() and (tmp_path/'digits.png').exists()

def test_nothing_is_said_of_a_network_that_has_learned_nothing(trained):
    found = diagnose(Learner(trained.dls, create_model('small_cnn', size=8, seed=1)))
    assert [f.kind for f in found.findings]==['stop'] and not {'bands','intraclass'} & panels_of(found).keys()
    assert all(math.isfinite(v) for v in found.quantities.values()) and np.isfinite(found.layers.to_numpy()).all()

@pytest.mark.parametrize('classes,placed', [(3, False), (10, True), (31, True), (100, False)])
def test_other_numbers_of_classes_are_not_compared(classes, placed):
    "No recorded network told 3 or 100 classes apart: what depends on that is not placed, the rest is"
    band = load_bands(200, 10_000, classes)
    assert ('c4' in band)==('similarity' in band)==('c3' in band['layers'])==placed
    assert 'energy' in band and 'energy' in band['layers'] and ('note' in band)==(not placed)

def test_networks_and_labels_that_cannot_be_judged_are_told():
    learn = make_learner(Run(n_train=50, n_valid=50))
    assert diagnose(learn, classes=np.array(list('abcdefghij'))).classes==list('abcdefghij')
    batches = DataLoader(TensorDataset(torch.rand(20, 1, 8, 8), torch.full((20,), 13)), 10)
    with pytest.raises(ValueError, match='class 13'): diagnose(learn.model, batches, batches)
    with torch.no_grad(): next(learn.model.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match='not finite: its training diverged'): diagnose(learn)

def test_curves_without_a_validation_loss_say_nothing_of_it():
    curves = pd.DataFrame(dict(train_loss=[1.,.5,.4,.3,.2,.1]))
    net,data = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10)),get_dls('digits', n_train=40, n_valid=40, device='cpu')
    assert 'validation loss' not in str(diagnose(net, data.train, data.valid, curves=curves))
