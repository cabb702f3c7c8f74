"Comparisons that fit a time: what is given up, what chooses, what judges, and what is said at the end"
import json, re
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from phantom_nb import cli
from phantom_nb.data import get_dls
from phantom_nb.experiments import gpu
from phantom_nb.experiments.plan import advise, comparison_runs, detectable_words, divide_time, has_test_images, kept_plan, mean_and_interval
from phantom_nb.experiments.plan import other_ways, plan_comparison, seconds_for, unfit_words, validation_images
from phantom_nb.experiments.run import Run
from phantom_nb.experiments.runner import load_results, make_learner
from phantom_nb.experiments.stats import SAME
from phantom_nb.experiments.sweep import runs_of
from phantom_nb.experiments.timing import ratio_interval

@given(st.floats(1, 1e5), st.floats(.01, 100), st.floats(0, 100), st.integers(1, 8))
@settings(deadline=None, max_examples=200)
def test_what_is_planned_fits_its_time(budget, epoch, judging, jobs):
    try: fit = divide_time(budget, epoch, judging, jobs)
    except ValueError as e:
        assert 'too short' in str(e) and seconds_for(2, 3, 5, epoch, judging, jobs)>budget
        return
    assert fit.seconds<=budget and fit.methods[0]=='none' and len(fit.methods)>=2 and 3<=fit.seeds<=10 and 5<=fit.epochs<=80
    assert fit.seconds==pytest.approx(seconds_for(len(fit.methods), fit.seeds, fit.epochs, epoch, judging, jobs))

@given(st.floats(100, 1e4))
@settings(deadline=None, max_examples=50)
def test_more_time_gives_up_less(budget):
    times = dict(epoch=1., judging=1.)
    size = lambda fit: (len(fit.methods)*fit.seeds*fit.epochs, )
    try: a = divide_time(budget, **times)
    except ValueError: return
    b = divide_time(2*budget, **times)
    assert len(a.left_out)>=len(b.left_out) and size(b)>=size(a)

def test_time_that_is_left_goes_into_training_first():
    "Twice the usual epochs, then seeds, then epochs again; what is asked for stays"
    times = dict(epoch=1., judging=0., methods=['mixup'], usual_epochs=20)
    def shape(seeds, epochs): return (fit := divide_time(seconds_for(2, seeds, epochs, 1., 0., 1), **times)).seeds, fit.epochs
    for asked in ((5,20), (5,30), (5,40), (7,40), (10,40), (10,60), (10,80)): assert shape(*asked)==asked
    assert shape(20, 200)==(10,80)
    assert divide_time(1e5, **times, epochs=12).epochs==12 and divide_time(1e5, **times, seeds=4).seeds==4

def test_a_method_may_bring_its_settings(capsys, monkeypatch, tmp_path):
    "In a comparison with and without a budget; a method with two settings, and an unknown setting, are refused"
    a,b = comparison_runs('digits', methods=['none','half_mhe:lam=3'], seeds=1)
    assert a.method=='none' and (b.method, dict(b.settings)['lam'])==('half_mhe', 3.) and type(dict(b.settings)['lam']) is float
    runs,fit = plan_comparison(Run(), 6000, ['none','half_mhe:lam=3'], 3, 2, device='cpu', jobs=1)
    assert fit.methods==('none','half_mhe:lam=3') and {run.method:dict(run.settings).get('lam') for run in runs}=={'none':None, 'half_mhe':3.}
    found = pd.DataFrame(rows('none', [.70,.72,.71], [.69,.70,.70])+rows('half_mhe', [.74,.75,.76], [.73,.74,.745]))
    assert 'Use half_mhe' in advise(found, methods=fit.methods, seeds=3)
    for wrong,said in (('half_mhe:lam=1,half_mhe:lam=3', 'half_mhe is there twice'), ('half_mhe:lamb=3', "did you mean 'lam'"), ('half_mhe:3', 'write a setting like half_mhe:lam=3')):
        with pytest.raises(ValueError, match=re.escape(said)): comparison_runs('digits', methods=wrong.split(','))
        with pytest.raises(SystemExit): cli.main(['compare','--methods',wrong])
        assert said in capsys.readouterr().err.replace('\n', ' ')

def test_what_else_to_try_is_named_where_networks_are_often_wrong():
    plain = pd.DataFrame(rows('none', [.5]*3, [.5]*3)).assign(data='./photos', size=64, pretrained=False)
    said = other_ways(plain)
    assert '50 % of the test images' in said and '--size 128' in said and '--pretrained' in said
    assert '--size' not in other_ways(plain.assign(size=128)) and 'timm' not in other_ways(plain.assign(pretrained=True))
    assert other_ways(plain.assign(accuracy=.95))==other_ways(plain.assign(data='digits'))==other_ways(plain[['method','accuracy']])==''

def test_nothing_is_recommended_before_plain_training_fits():
    found = pd.DataFrame(rows('none', [.70,.72,.71], [.69,.70,.70])+rows('mixup', [.74,.75,.76], [.73,.74,.745]))
    assert 'Use mixup on these images' in advise(found) and 'Use mixup' in advise(found.assign(train_accuracy=.95))
    said = advise(found.assign(train_accuracy=.74, epochs=30))
    assert 'right on 74.0 % of its training images' in said and '(60 epochs)' in said and 'Use mixup' not in said

def test_what_is_asked_for_stays():
    fit = divide_time(1e4, 1., 1., methods=['mhe','dropout+mhe'], seeds=2, epochs=3)
    assert (fit.methods, fit.seeds, fit.epochs)==(('none','mhe','dropout+mhe'), 2, 3) and not fit.left_out
    with pytest.raises(ValueError, match='3 methods, 2 seeds and 3 epochs take about'): divide_time(5, 1., 1., methods=['mhe','dropout'], seeds=2, epochs=3)
    with pytest.raises(ValueError, match='time_budget=0'): divide_time(0, 1., 1.)

def test_plan_is_kept_for_the_same_wishes(tmp_path):
    def make(budget): return lambda: plan_comparison(Run(epochs=2), budget, methods=['dropout'], seeds=2, device='cpu', jobs=1)
    a,fit = kept_plan(tmp_path/'plan.json', make(6000), dict(seconds=600))
    b,again = kept_plan(tmp_path/'plan.json', lambda: pytest.fail("planned anew"), dict(seconds=600))
    assert a==b and fit.epochs==again.epochs and [run.seed for run in a]==[0,0,1,1] and a[0].n_valid==200 and a[0].test
    asked = []
    kept_plan(tmp_path/'plan.json', lambda: asked.append(1) or make(6000)(), dict(seconds=601))
    assert asked

def test_validation_images():
    assert validation_images(torch.arange(100)%10)==20 and validation_images([0]*90+[1]*9)==6
    with pytest.raises(ValueError, match='class number 1 has 2 images beside those that judge: give at least 3'): validation_images([0]*90+[1]*2)

def rows(method, valid, test): return [dict(method=method, seed=i, status='done', valid_accuracy=v, accuracy=t) for i,(v,t) in enumerate(zip(valid, test))]

def test_validation_chooses_and_test_judges():
    plain = rows('none', [.70,.72,.71], [.69,.70,.70])
    lucky = rows('mixup', [.60,.62,.61], [.90,.91,.92]) # best on test, never chosen
    good = rows('dropout', [.74,.75,.76], [.73,.74,.745])
    assert 'Use dropout on these images' in advise(pd.DataFrame(plain+lucky+good))
    assert 'No method beat plain training' in advise(pd.DataFrame(plain+lucky))
    fooled = rows('dropout', [.80,.81,.82], [.60,.61,.605])
    assert 'worse: use plain training' in advise(pd.DataFrame(plain+fooled))
    assert 'Nothing is shown' in advise(pd.DataFrame(plain+rows('dropout', [.74,.75,.76], [.60,.80,.70])))
    assert 'One seed' in advise(pd.DataFrame(plain[:1]+good[:1])) and 'nothing can be compared' in advise(pd.DataFrame(good))

def test_overlapping_training_sets_widen_the_interval():
    d = [.01,.02,.015,.012,.018]
    mean,low,high = mean_and_interval(d)
    _,low5,high5 = mean_and_interval(d, 1/5)
    assert mean==pytest.approx(.015) and (high5-low5)/(high-low)==pytest.approx(np.sqrt((1/5+1/4)/(1/5)))

def test_ratio_and_words():
    assert ratio_interval([2.,2.,2.])==pytest.approx((2,2,2)) and ratio_interval([1.,4.])[0]==pytest.approx(2)
    assert 'no interval' in detectable_words(1, 3)
    size = [float(re.search(r'about ([\d.]+)', detectable_words(n, 4))[1]) for n in (3,5,10)]
    assert size==sorted(size, reverse=True)

@pytest.fixture
def photos(tmp_path):
    "Two kinds of small pictures that are easy to tell apart, and no test images"
    rng = np.random.default_rng(0)
    for i,name in enumerate(('dark','light')):
        (tmp_path/'photos'/name).mkdir(parents=True)
        for k in range(30):
            x = np.clip(rng.normal(90+60*i, 60, (20,24,3)), 0, 255).astype('uint8')
            Image.fromarray(x).save(tmp_path/'photos'/name/f'{k}.png')
    return tmp_path/'photos'

def test_compare_on_a_folder_without_test_images_cross_validates(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    assert not has_test_images(str(photos))
    args = ['compare', '--data', './photos', '--size', '16', '--methods', 'none,dropout', '--epochs', '2', '--seeds', '3', '--time-budget', '60m', '--jobs', '1']
    for sitting in (1,2):
        with pytest.raises(SystemExit) as e: cli.main(args)
        out = capsys.readouterr()
        assert e.value.code==0, out.err
        assert f"2 methods, 3 seeds, 2 epochs: {'about' if sitting==1 else 'nothing is left to run'}" in out.out
        assert ('can show differences' in out.out)==(sitting==1) and 'Training images are not augmented (' not in out.out
        assert 'plain training' in out.out.splitlines()[-1] or 'dropout' in out.out.splitlines()[-1]
    assert '6 of 6 runs are recorded already' in out.out
    assert '[1/6]' not in out.out # and not told again
    df = load_results('compare/photos-all/runs')
    assert set(df.folds)=={5} and {'valid_accuracy','accuracy'}<=set(df) and (df.n_train+df.n_valid).eq(48).all() and json.loads(Path('compare/photos-all/plan.json').read_text())

def test_a_sweep_trains_on_all_images_of_a_folder(photos):
    table = dict(data=str(photos), methods=['none'], seeds=1)
    assert [run.n_train for run in runs_of(table, 'e')]==[None]
    assert [run.n_train for run in runs_of(table | dict(n_train=[20,'all']), 'e')]==[20,None]
    assert [run.n_train for run in runs_of(table | dict(data='digits'), 'e')]==[200]

def test_gpu_pieces_are_refused_kindly_where_there_is_none(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(SystemExit) as e: cli.main(['gpu'])
    out = capsys.readouterr().out
    assert e.value.code==0 and 'no GPU on this machine' in out and all(name in out for name in gpu.PIECES) and "[dev,tune]" in out
    with pytest.raises(SystemExit) as e: cli.main(['gpu', 'steps'])
    assert e.value.code==2

@pytest.mark.parametrize('text,seconds', [('90s',90), ('30m',1800), ('1h30m',5400), ('2h',7200), ('45',45), ('1.5h',5400)])
def test_durations(text, seconds): assert cli.seconds_of(text)==seconds

@pytest.mark.parametrize('text', ['', 'h', '3 days', '-5s', '0', '30 m 2', '1h30', '2h5'])
def test_wrong_durations(text):
    with pytest.raises(ValueError, match='such as 90s, 30m'): cli.seconds_of(text)

def compare(capsys, *args):
    "Status, output and errors of `phantom_nb compare`, quick and in one process"
    with pytest.raises(SystemExit) as e: cli.main(['compare', '--size', '16', '--epochs', '1', '--jobs', '1', *args])
    said = capsys.readouterr()
    return e.value.code, said.out, said.err

@pytest.fixture
def few(tmp_path, monkeypatch):
    "Makes a folder of three classes of noise: few(n) images each"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    rng = np.random.default_rng(0)
    def make(n, place='imgs'):
        for name in ('ant','bee','cat'):
            (tmp_path/place/name).mkdir(parents=True, exist_ok=True)
            for k in range(n): Image.fromarray(rng.integers(0, 255, (20,24,3), dtype='uint8')).save(tmp_path/place/name/f'{k}.png')
        return './imgs'
    return make

def test_changed_images_are_not_shown_as_new(few, capsys):
    folder = few(8)
    code,out,_ = compare(capsys, '--data', folder, '--methods', 'none', '--seeds', '2')
    assert code==0 and '21 images train, 3 judge' in out and 'one image more or less right is 33 points' in out and '[2/2]' in out
    first = load_results('compare/imgs-all/runs')
    code,out,_ = compare(capsys, '--data', folder, '--methods', 'none', '--seeds', '2')
    assert '2 of 2 runs are recorded already' in out and 'other images' not in out
    few(9)
    code,out,_ = compare(capsys, '--data', folder, '--methods', 'none', '--seeds', '2')
    assert code==0 and '2 more in compare/imgs-all saw other images' in out and 'recorded already' not in out
    table = pd.read_csv('compare/imgs-all/results.csv')
    assert len(table)==2 and not set(table.key) & set(first.key) and first.images.nunique()==1 and set(table.images)!=set(first.images)

def test_one_image_a_class_is_refused_before_training(few, capsys):
    code,out,err = compare(capsys, '--data', few(1))
    assert code==2 and 'no image is left to judge' in err and 'Traceback' not in err and not Path('compare').exists()
    code,out,err = compare(capsys, '--data', few(2), '--time-budget', '9m')
    assert code==2 and "the class 'ant' has 1 image beside those that judge" in err

def test_a_class_of_one_photo_is_refused_before_training(photos, capsys, monkeypatch, tmp_path):
    "Its photo judges with the first seed and trains with the others, so the plan of the first seed must see it"
    monkeypatch.chdir(tmp_path)
    (photos/'rare').mkdir()
    (photos/'dark'/'0.png').rename(photos/'rare'/'0.png')
    code,_,err = compare(capsys, '--data', 'photos', '--size', '16', '--time-budget', '9m')
    assert code==2 and re.search(r"the class 'rare' has [01] images? beside those that judge", err), err

def test_a_folder_has_one_name_however_it_is_spelt(photos, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'x').mkdir()
    for i,spelt in enumerate(('photos', './photos/', str(photos), 'x/../photos')):
        code,out,_ = compare(capsys, '--data', spelt, '--size', '16', '--methods', 'none', '--epochs', '1', '--seeds', '1')
        assert code==0 and ('1 of 1 runs are recorded already in compare/photos-all' in out)==(i>0), (spelt, out)
    photos.rename(tmp_path/'x'/'photos')
    code,out,_ = compare(capsys, '--data', 'x/photos', '--size', '16', '--methods', 'none', '--epochs', '1', '--seeds', '1')
    assert code==0 and 'recorded already' not in out and sorted(p.name for p in Path('compare').iterdir())==['photos-all','x-photos-all']

def test_the_training_part_of_a_data_set_is_told(few, capsys):
    few(4, 'set/train')
    few(3, 'set/test')
    code,out,_ = compare(capsys, '--data', './set/train', '--methods', 'none', '--seeds', '1')
    assert "is the training part of 'set': name that folder to use its 'test' too" in out
    assert '1 epoch' in out and '1 epochs' not in out and '1 seeds' not in out
    code,out,_ = compare(capsys, '--data', './set', '--methods', 'none', '--seeds', '1')
    assert 'training part' not in out and '12 images train, 9 judge' in out

def test_plain_training_is_added_and_progress_names_the_method(few, capsys):
    code,out,_ = compare(capsys, '--data', few(4), '--methods', 'mixup', '--seeds', '1')
    assert 'Plain training (none) is added' in out and '[2/2] mixup seed 0' in out and 'One seed has no interval' in out and 'mixup alpha=0.4' in out

def test_the_answer_shows_its_validation_numbers_and_the_time_that_was_understood(photos, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    code,out,_ = compare(capsys, '--data', './photos', '--methods', 'dropout', '--seeds', '3', '--time-budget', '1800')
    assert 'of the 30 min given' in out and '(with every seed others)' in out
    last = out.splitlines()[-1]
    assert 'on the validation images' in last.lower() or 'chosen on validation images' in last.lower()
    assert re.search(r'[\d.]+ % against [\d.]+ % of plain training', last), last
    code,_,err = compare(capsys, '--data', './photos', '--methods', 'dropout', '--seeds', '9', '--time-budget', '0.001', '--out', 'x')
    assert code==2 and 'a time of 1 s is too short: 2 methods, 9 seeds and 1 epoch take about' in err

def test_too_few_runs_choose_nothing():
    plain = rows('none', [.70,.72,.71], [.69,.70,.70])
    good = rows('dropout', [.74,.75,.76], [.73,.74,.745])
    told = advise(pd.DataFrame(plain[:1]+good[:1]), methods=('none','dropout'), seeds=3)
    assert told=='2 of 6 runs are finished, too few to choose a method: that takes 3 seeds of every method.'
    assert 'Use dropout' in advise(pd.DataFrame(plain+good), methods=('none','dropout'), seeds=3)
    assert 'too few' in advise(pd.DataFrame(plain+good), methods=('none','dropout','mixup'), seeds=3)
    assert '75.0 % against 71.0 % of plain training' in advise(pd.DataFrame(plain+good))

def test_few_test_images_show_less():
    sizes = [float(re.search(r'about ([\d.]+)', detectable_words(5, 4, n))[1]) for n in (10_000, 1000, 100, 30)]
    assert sizes==sorted(sizes) and sizes[-1]>3*sizes[0] and 'no difference at all' in detectable_words(3, 8, 1)

def test_methods_that_do_not_go_together_are_refused_before_training(few, capsys):
    code,out,err = compare(capsys, '--data', few(4), '--methods', 'mixup+cutmix')
    assert code==2 and 'both mix images and labels' in err and not Path('compare').exists()

def test_a_method_that_diverged_in_every_run_does_not_block_the_others():
    found = rows('none', [.70,.72,.71], [.69,.70,.70])+rows('mixup', [.74,.75,.76], [.73,.74,.745])
    lost = [dict(row, status='diverged') for row in rows('srip', [.1]*3, [.1]*3)]
    said = advise(pd.DataFrame(found+lost), methods=('none','mixup','srip'), seeds=3)
    assert 'Use mixup on these images' in said and said.endswith('Not judged: srip, which failed or diverged.')
    assert 'too few to choose' in advise(pd.DataFrame(found+lost[:2]), methods=('none','mixup','srip'), seeds=3) # it may still end well

def test_equal_differences_show_nothing():
    "With few test images they are common"
    found = rows('none', [.70,.72,.71], [.80,.85,.75])+rows('mixup', [.74,.75,.76], [.85,.90,.80])
    assert advise(pd.DataFrame(found), methods=('none','mixup'), seeds=3).endswith(SAME)
    assert advise(pd.DataFrame([row for row in found if row['seed']<2])).endswith(SAME)

def lose(found, method, seeds): return [dict(row, status='diverged') if (row['method'],row['seed'])[0]==method and row['seed'] in seeds else row for row in found]

def test_a_method_that_diverged_in_some_runs_neither_blocks_nor_is_relied_on():
    found = rows('none', [.70]*5, [.69,.70,.70,.71,.69])+rows('mixup', [.75]*5, [.73,.74,.745,.75,.73])+rows('sam', [.6]*5, [.6]*5)
    names = 'none','mixup','sam'
    said = advise(pd.DataFrame(lose(found, 'sam', [0,1,2])), methods=names, seeds=5)
    assert 'Use mixup on these images' in said and said.endswith('Not judged: sam, which failed or diverged.')
    assert advise(pd.DataFrame(lose(found, 'mixup', [0,1])), methods=names, seeds=5).endswith('But 2 runs of mixup failed or diverged: do not rely on it here.')
    both = lose(lose(found, 'mixup', [0,1]), 'sam', [2,3])
    failed = advise(pd.DataFrame(lose(found, 'none', [0,1,2])), methods=names, seeds=5)
    assert failed=='2 seeds finished with every method, too few to choose one: plain training failed or diverged in 3, try a smaller learning rate.'
    assert advise(pd.DataFrame(both), methods=names, seeds=5)=='1 seed finished with every method, too few to choose one: leave out mixup, sam.'

def test_a_small_validation_folder_chooses_whole(monkeypatch, tmp_path):
    import phantom_nb.experiments.plan as plan
    monkeypatch.setattr(plan, 'step_seconds', lambda *args, **kwargs: .01)
    for split,n in dict(train=12, valid=2, test=5).items():
        for name in 'ab':
            (tmp_path/split/name).mkdir(parents=True)
            for i in range(n): Image.new('L', (8, 8), 20*i).save(tmp_path/split/name/f'{i}.png')
    runs,_ = plan_comparison(Run(data=str(tmp_path), n_train=None), 60., jobs=1, device='cpu')
    assert {run.n_valid for run in runs}=={4} and make_learner(runs[0], device='cpu').dls.valid_ds.y.bincount().tolist()==[2,2]
    with pytest.raises(ValueError, match='n_valid=10'): get_dls(str(tmp_path), n_valid=10)

def test_a_number_of_images_a_class_is_planned_as_such(monkeypatch):
    import phantom_nb.experiments.plan as plan
    monkeypatch.setattr(plan, 'step_seconds', lambda *args, **kwargs: .01)
    fits = [plan_comparison(run, 60., jobs=1, device='cpu')[1] for run in (Run(n_train=50), Run(n_train=None, per_class=5))]
    assert fits[0]==fits[1]

def test_other_options_of_recorded_rows_are_those_that_differ():
    rows = pd.DataFrame([dict(vars(Run(epochs=4, size=24, model=model, method='mixup')), settings=()) for model in ('plain_cnn','small_cnn')])
    assert cli._options_of(rows, Run(epochs=4, size=16))=='model plain_cnn, small_cnn; size 24'
    assert cli._options_of(rows[1:], Run(epochs=4, size=24))=='methods or settings'

def test_few_steps_an_epoch_are_said():
    rows = pd.DataFrame([dict(method='none', train_accuracy=.6, epochs=20, n_train=72, bs=64)])
    assert 'Train longer first, in batches of 16 (40 epochs)' in ' '.join(unfit_words(rows))
    assert 'batches' not in ' '.join(unfit_words(rows.assign(bs=16)))+' '.join(unfit_words(rows.assign(n_train=1000)))

def test_batches_are_as_asked(capsys, tmp_path):
    code,_,_ = compare(capsys, '--methods', 'mixup', '--seeds', '1', '--n-train', '40', '--bs', '20', '--out', str(tmp_path))
    assert code==0 and set(load_results(tmp_path/'runs').bs)=={20}
    code,_,err = compare(capsys, '--bs', '1', '--out', str(tmp_path))
    assert code==2 and 'bs=1' in err
