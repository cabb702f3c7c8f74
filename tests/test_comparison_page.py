"The page on a comparison: what was felt, what was moved, what stands on sound ground"
import json, re
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest
from rich.console import Console
from typer.testing import CliRunner

from phantom_nb import cli
from phantom_nb.cli import app
from phantom_nb.experiments.report import show_comparison
from phantom_nb.experiments.stats import comparison
from phantom_nb.experiments.run import Run
from phantom_nb.experiments.store import write_row
from phantom_nb.experiments.comparison_page import comparison_html, draw_times, judge_comparison, label_heights, moved_quantities, save_comparison

def rows(seeds=5, train=1., share=.1, **more):
    "Plain training and a penalty that halves the calibration error and nothing else."
    gen = np.random.default_rng(0)
    out = []
    for method in ('none','mhe'):
        for seed in range(seeds):
            luck = gen.normal(0, .01)
            out.append(dict(key=f'{method}{seed}', experiment='x', data='digits', n_train=200, model='small_cnn', method=method, seed=seed, status='done',
                settings=dict(lam=1.) if method=='mhe' else {}, seconds=2. if method=='mhe' else 1., accuracy=.8+luck, train_accuracy=train,
                ece=(.1 if method=='none' else .05)+gen.normal(0, .001), net_c3=1+gen.normal(0, .01),
                share=share if method=='mhe' else np.nan, **more))
    return pd.DataFrame(out)

def facts(df): return ' '.join(map(str, judge_comparison(df)))

def test_only_what_is_shown_is_said():
    moved = moved_quantities(rows()).set_index(['quantity','method']).shown
    assert moved['ece','mhe'] and not moved['c3','mhe']
    assert 'Calibration error' in facts(rows()) and 'C3' not in facts(rows())
    assert not moved_quantities(rows(2)).shown.any() # two seeds show nothing

@pytest.mark.parametrize('share,word', [(.01, 'try lam=10'), (.7, 'try lam=0.2'), (.1, None)])
def test_a_penalty_that_was_not_felt_is_named(share, word):
    told = facts(rows(share=share))
    assert word in told if word else 'share of the gradient' not in told

def test_labels_keep_their_distance_and_their_order():
    "Against a quadratic programme; labels that are far apart stay where they are"
    from scipy.optimize import minimize
    heights = np.array([0., .01, .02, .5, .9, .91])
    placed = label_heights(heights, .1)
    assert (np.diff(placed)>=.1-1e-9).all()
    steps = [dict(type='ineq', fun=lambda h, i=i: h[i+1]-h[i]-.1) for i in range(5)]
    best = minimize(lambda h: ((h-heights)**2).sum(), placed+.01, constraints=steps, options=dict(ftol=1e-12))
    np.testing.assert_allclose(placed, best.x, atol=1e-4)
    np.testing.assert_allclose(label_heights([0., .4, .9], .1), [0., .4, .9])

def test_what_to_do_is_said_in_the_terminal_too(tmp_path, capsys):
    df = rows(share=.01, train=.6)
    cli._write_page(Console(width=400), df, df, tmp_path/'page.html')
    out = capsys.readouterr().out
    assert 'try lam=10' in out and 'Train longer first' in out and 'Page: ' in out and 'Calibration error' not in out
    two = pd.concat([df.assign(n_train=100), df.assign(n_train=200, key=df.key+'b')])
    cli._say_findings(Console(width=400), two)
    assert capsys.readouterr().out.count('n_train 200')==2

def test_a_second_comparison_keeps_the_first_on_the_page(tmp_path, capsys):
    "Other epochs, in the same folder: a section each on the page, all rows in the CSV, the new one alone in the terminal"
    runs = [Run(method=m, seed=i, epochs=e, n_train=100) for e in (5,9) for m in ('none','mhe') for i in range(3)]
    made = rows(3)
    for run in runs:
        like = made[(made.method==run.method) & (made.seed==run.seed)].iloc[0].to_dict()
        write_row(tmp_path/'runs'/f'{run.name}.json', like | dict(key=run.key, epochs=run.epochs, n_train=100, images=''))
    console,asked = Console(width=200),[run for run in runs if run.epochs==9]
    show_comparison(asked, tmp_path, console)
    cli._write_all(console, asked, tmp_path)
    out,page = capsys.readouterr().out,(tmp_path/'comparison.html').read_text()
    assert '9 epochs' in out and '5 epochs' not in out
    assert page.count('<section>')==2 and 'epochs 5' in page and 'epochs 9' in page
    assert set(pd.read_csv(tmp_path/'results.csv').epochs)=={5,9}

def test_rows_of_another_version_are_counted_also_where_none_is_asked_for(tmp_path):
    (tmp_path/'runs').mkdir()
    for row in rows(2).to_dict('records'): write_row(tmp_path/'runs'/f"{row['key']}.json", row)
    kept = rows(2)
    for asked,n in ((None,4), (kept[:0][[]],4), (kept[:3],1)): assert cli._others_words(tmp_path, asked).startswith(f'{n} more in ')
    assert cli._others_words(tmp_path, kept) is None and cli._others_words(tmp_path/'none', None) is None

def test_networks_that_do_not_fit_are_no_ground():
    assert 'Train longer first' in facts(rows(train=.6)) and 'Train longer' not in facts(rows())
    assert 'points less on test images' in facts(rows())

def test_the_page_is_one_file_and_escapes(tmp_path):
    df = pd.concat([rows(), rows().assign(n_train=400, key=lambda d: d.key+'b')])
    page,picture = save_comparison(df, tmp_path/'deep'/'page.html', '<b>mine</b>')
    text = page.read_text(encoding='utf-8')
    assert text.count('<section>')==2 and '<b>mine</b>' not in text and picture.stat().st_size>1000
    assert not re.findall(r'(?:src|href)="(?!data:)', text) and len(text)<1_500_000
    assert text.count('<img alt="')==4
    with pytest.raises(ValueError, match='nothing to compare with'): comparison_html(df, baseline='dropout')

def test_compare_and_sweep_write_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    res = CliRunner().invoke(app, 'compare --methods none,half_mhe --seeds 2 --epochs 2 --n-train 50 --jobs 1'.split())
    assert res.exit_code==0 and 'comparison.html' in res.stdout, res.output
    assert 'half_mhe' in (tmp_path/'compare/digits-50/comparison.html').read_text()
    (tmp_path/'s.toml').write_text('experiment = "s"\nn_train = 50\nepochs = 2\nseeds = 2\nmethods = ["none", "dropout"]\n')
    res = CliRunner().invoke(app, ['sweep', 's.toml', '--jobs', '1'])
    assert res.exit_code==0 and 'dropout' in (tmp_path/'sweeps/s/comparison.html').read_text(), res.output

def test_settings_without_a_finished_baseline_and_without_times():
    "All of plain training diverged; a table from before times were recorded"
    df = rows()
    with pytest.raises(ValueError, match='no finished run'): comparison_html(df.assign(status=df.status.where(df.method!='none', 'diverged')))
    assert 'Gain' not in comparison_html(df.assign(seconds=np.nan)) and 'All methods' in comparison_html(df.assign(seconds=np.nan))

def test_a_folder_whose_size_was_not_given():
    "What else to try, where plain training is often wrong"
    df = rows(train=.95).assign(data='photos/', size=None, pretrained=False, accuracy=.7)
    assert 'a pretrained network' in comparison_html(df) and 'larger images' not in comparison_html(df)
    assert 'larger images (--size 128)' in comparison_html(df.assign(size=64))

def test_rows_from_before_images_were_named(tmp_path, capsys):
    "They are of the same images: nothing changed in a data set with a name"
    def compare():
        with pytest.raises(SystemExit) as e: cli.main(['compare', '--methods', 'mixup', '--seeds', '1', '--epochs', '1', '--n-train', '40', '--jobs', '1', '--out', str(tmp_path)])
        return e.value.code, ' '.join(capsys.readouterr().out.split())
    assert compare()[0]==0
    for file in (tmp_path/'runs').glob('*.json'):
        row = json.loads(file.read_text())
        file.write_text(json.dumps({k:v for k,v in row.items() if k not in ('images', 'digest')}))
    code,out = compare()
    assert code==0 and 'other images' not in out and '2 of 2 runs are recorded already' in out

def test_a_method_without_a_shared_seed_has_no_place_among_gains():
    def rows(name, accuracy, seeds): return [dict(data='digits', n_train=200, model='small_cnn', method=name, settings={}, seed=i, status='done', accuracy=accuracy+.001*i, seconds=1.,
        train_accuracy=1.) for i in seeds]
    df = pd.DataFrame(rows('none', .8, range(5))+rows('a', .85, range(5))+rows('b', .6, range(10, 15)))
    ax = plt.subplots()[1]
    draw_times(ax, comparison(df))
    assert {text.get_text() for text in ax.texts}=={'none','a'}
    plt.close('all')

def test_another_baseline_is_not_called_plain():
    df = pd.DataFrame([dict(data='digits', n_train=200, method=m, seed=s, status='done', accuracy=a+.01*s, train_accuracy=.7+.01*s, epochs=5, settings={},
        valid_sparsity=.2+.1*(m=='none')+.001*s, net_sparsity=.2+.1*(m=='none')+.001*(s*(1+(m=='none')))) for m,a in dict(none=.8, cutmix=.7).items() for s in range(5)])
    assert any('Plain training' in f.fact for f in judge_comparison(df))
    told = [f.fact for f in judge_comparison(df, 'cutmix')]
    assert any('in cutmix, is changed by none' in fact for fact in told) and not any('lain training' in fact for fact in told)
