"Reports in words, tables and pictures; rows are filtered and told apart"
import json, re
from dataclasses import asdict

import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest
from matplotlib.colors import to_rgba
from pathlib import Path
from rich.console import Console

from phantom_nb import cli
from phantom_nb.experiments.report import (BETTER, NEITHER, WORSE, as_markdown, as_rich, direction_words, filter_rows, front_figure, house_style, legend,
    metric_words, plot_comparison, plot_comparisons, run_labels, show_comparison, show_results, tell_apart, text_cells, verdict)
from phantom_nb.experiments.run import Run
from phantom_nb.experiments.stats import comparison, comparisons
from phantom_nb.experiments.store import load_results
from test_stats import LUCK, RUNS, frame, null_frame

RESULTS = Path(__file__).parent.parent/'results'

@pytest.fixture(autouse=True)
def closed():
    "No figure is left open"
    yield
    plt.close('all')

@pytest.fixture
def many():
    rng,rows = np.random.default_rng(0),[]
    for data in ('digits','fashion_mnist'):
        for n in (50,200,1000): rows.append(null_frame(rng).assign(data=data, n_train=n))
    return pd.concat(rows)

# In words, tables, pictures

def test_verdict_in_words():
    text = verdict(comparison(frame()))
    assert 'Best against none: up, +5.0 points [+3.7, +6.3].' in text
    assert 'Corrected for 3 methods, better: up; worse: down; no difference shown: noisy.' in text
    assert f"4 seeds could have shown {100*comparison(frame()).detectable['noisy']:.1f} points or more." in text
    one = verdict(comparison(frame({k:RUNS[k] for k in ('none','up')})))
    assert one=='Best against none: up, +5.0 points [+3.7, +6.3]. Better: up.'
    loss = verdict(comparison(frame({k:RUNS[k] for k in ('none','down')})))
    assert loss=='No method is ahead; closest to none: down, -5.0 points [-6.3, -3.7]. Worse: down.'
    none = verdict(comparison(null_frame(np.random.default_rng(3))))
    assert re.match(r'No difference to none is shown for any of \d methods, corrected for all\. (Best|Closest): ', none) and 'could have shown' in none
    noisy = frame({k:RUNS[k] for k in ('none','noisy')})
    tied = noisy[noisy.method=='none'].assign(method='tied') # the same in every seed: no test, and no difference shown
    assert 'for any of 2 methods' in verdict(comparison(pd.concat([noisy, tied])))
    alone = verdict(comparison(frame({k:RUNS[k] for k in ('none','noisy')})))
    assert re.match(r'No difference to none is shown\. (Best|Closest): noisy, ', alone)

def test_words_for_too_few_seeds_and_no_pairs():
    for n,words in ((1,'One seed has'), (2,'Two seeds have')):
        text = verdict(comparison(frame(dict(none=[.5,.6][:n], up=[.9,1.][:n]))))
        assert text==f'{words} no interval, so nothing is shown: run three or more to tell chance from effect.'
    assert 'is the same for all seeds' in verdict(comparison(frame(dict(none=LUCK, same=LUCK, plus=LUCK+.1))))
    assert verdict(comparison(frame(dict(mhe=[.5,.6]))))=='Nothing can be compared with none: no run of it is here.'
    assert verdict(comparison(frame(dict(none=[.5,.6]))))=='There are only runs of none: nothing is compared.'
    failed = frame(dict(none=[.5,.6], mhe=[.5,.6]), status='done')
    failed.loc[failed.method=='mhe', 'status'] = 'failed'
    assert verdict(comparison(failed))=='Nothing can be compared with none: no other method has a finished run.'
    apart = pd.concat([frame(dict(none=[.5,.6])), frame(dict(mhe=[.5,.6])).assign(seed=[7,8])])
    assert verdict(comparison(apart))=='Nothing can be compared with none: no two runs share a seed.'

def test_runs_are_named_by_what_varies():
    runs = [Run(method='mhe', settings=dict(lam=lam), n_train=n, lr=lr, seed=seed) for lam in (.1,1.) for n in (50,None) for lr in (.01,.1) for seed in (0,1)]
    labels = run_labels(runs)
    assert len(set(labels.values()))==len(runs) and labels[runs[0].key]=='50 lr=0.01 mhe lam=0.1 seed 0' and 'all lr=0.1 mhe lam=1.0 seed 1' in labels.values()
    assert list(run_labels(runs[:1]).values())==['mhe seed 0']

def test_words_for_a_loss_and_for_runs_left_out():
    df = frame().rename(columns=dict(accuracy='loss'))
    text = verdict(comparison(df, metric='loss'))
    assert text.startswith('Best against none: down, -0.050 [') and 'points' not in text and 'better: down; worse: up' in text
    df = frame(status='done')
    df.loc[(df.method=='noisy') & (df.seed>2), 'status'] = 'diverged'
    t = comparison(pd.concat([df, frame(dict(wild=LUCK+[.2,-.3,.1,.05]), status='done')]))
    assert '3/4' in as_markdown(t) and 'with fewer seeds: noisy' in verdict(t)

def test_words_for_many_comparisons(many):
    t = comparisons(many)
    assert verdict(t).count('\n')==5 and verdict(t).startswith('digits, 50: No difference to none is shown for any')
    many['n_train'] = many.n_train.where(many.n_train!=1000)
    lines = verdict(comparisons(many)).splitlines()
    assert len(lines)==6 and lines[0].startswith('digits, 50:') and lines[2].startswith('digits, nan:')

def printed(table, width=80, **kwargs):
    console = Console(width=width, record=True, file=open('/dev/null', 'w'), **kwargs)
    console.print(as_rich(table, 'title'))
    return console.export_text(styles='force_terminal' in kwargs)

def test_terminal_table_fits_and_names_everything(many):
    table = comparison(frame({'label_smoothing' if k=='up' else k:v for k,v in RUNS.items()}, train_accuracy=1., seconds=12.3))
    text = printed(table)
    assert all(len(l)<=80 for l in text.splitlines()) and '…' not in text and 'title' in text
    line, = [l for l in text.splitlines() if l.startswith('label_smoothing')]
    assert '60.0 [38.6, 81.4]' in line and '+5.0 [+3.7, +6.3]' in line and 'better' in line and '12.3' in line and line.split()[-1]=='4'
    assert '\x1b[36m' in printed(table, force_terminal=True) and '\x1b[35m' in printed(table, force_terminal=True)
    assert 'mhe[lam=1]' in printed(comparison(frame({'none':LUCK, 'mhe[lam=1]':LUCK+.1}))) # no markup
    text = printed(comparisons(many))
    assert 'title: digits, 50' in text and text.count('vs none, points')==6

def test_markdown_table(many):
    lines = as_markdown(comparison(frame())).splitlines()
    assert len({l.count('|') for l in lines})==1 and len(lines)==2+4 and set(lines[1])<=set('|:- ')
    row = [o.strip() for o in next(l for l in lines if l.startswith('| up')).split('|')][1:-1]
    head = [o.strip() for o in lines[0].split('|')][1:-1]
    cells = dict(zip(head, row))
    assert cells['vs none, points']=='+5.0 [+3.7, +6.3]' and cells['shown']=='better' and cells['gap']=='-' and cells['runs']=='4'
    lines = as_markdown(comparisons(many)).splitlines()
    assert len(lines)==2+42 and lines[2].startswith('| digits, 50 | none |')
    assert 'test loss (lower is better) |' in as_markdown(comparison(frame().rename(columns=dict(accuracy='loss')), metric='loss'))

def places(ax, names):
    "What is drawn beside each name"
    points = np.ma.filled(ax.collections[-1].get_offsets(), np.nan) if len(ax.collections)<3 else np.ma.filled(ax.collections[1].get_offsets(), np.nan)
    return {names[round(y)]:x for x,y in points if not np.isnan(x)}

def tick_names(ax): return {round(y):t.get_text() for y,t in zip(ax.get_yticks(), ax.get_yticklabels())}

def test_picture_has_every_method_beside_its_own_name():
    table = comparison(frame())
    axs = plot_comparison(table)
    names = tick_names(axs[0])
    for ax,col in zip(axs, ('accuracy','diff')): assert places(ax, names) == pytest.approx((table[col].dropna()*100).to_dict())
    said = table.verdict.map(dict(better=BETTER, worse=WORSE)).fillna(NEITHER)
    assert [tuple(c) for c in axs[1].collections[1].get_edgecolors()]==[to_rgba(c) for c in said]
    legend, = axs[0].figure.legends
    assert [t.get_text() for t in legend.get_texts()]==['better','worse','no difference shown']

def test_pictures_of_many_comparisons(many):
    t = comparisons(many)
    axs = plot_comparisons(t, ncols=4)
    assert axs.shape==(2,4) and [a.axison for a in axs.flat]==[True]*6+[False]*2
    names = tick_names(axs[0,0])
    assert 'none' not in names.values()
    for ax,(k,o) in zip(axs.flat, t.groupby(level=[0,1], sort=False)):
        assert ax.get_title('left')==f'{k[0]}, {k[1]}' and places(ax, names)==pytest.approx((o.droplevel([0,1])['diff'].dropna()*100).to_dict())

def test_loss_is_drawn_in_its_own_unit():
    df = frame().rename(columns=dict(accuracy='loss'))
    table = comparison(df, metric='loss')
    axs = plot_comparison(table)
    assert axs[0].get_xlabel()=='test loss (lower is better)' and axs[1].get_xlabel()=='difference to none'
    assert places(axs[0], tick_names(axs[0]))==pytest.approx(table.loss.to_dict())
    plt.close('all')

def test_a_method_that_was_not_run_is_named_as_such(many):
    lost = many[~((many.data=='digits') & (many.n_train==50) & (many.method=='1'))]
    axs = plot_comparisons(comparisons(lost))
    assert [t.get_text() for t in axs[0,0].texts]==['not run'] and not any(ax.texts for ax in axs.flat[1:6])
    with pytest.raises(ValueError, match="nothing to draw"): plot_comparisons(comparisons(many[many.method!='none']))

def test_long_names_leave_room_for_the_panels():
    long = 'phantom_contrast lam=0.3 tau=0.1 weights=dirichlet detach=True queue=8 k=16 mode=contrast centre=False'
    runs = {f'{k} {long}':v for k,v in RUNS.items()}
    df,kw = frame(runs, data='x', n_train=9),dict(baseline=f'none {long}')
    for axs in (plot_comparison(comparison(df, **kw)), plot_comparisons(comparisons(df, **kw)).flat):
        fig = axs[0].figure
        fig.draw_without_rendering()
        for ax in axs: assert ax.get_position().width*fig.get_figwidth()>1.5, 'inches'
        boxes = [t.get_window_extent() for t in axs[0].get_yticklabels()]
        assert min(b.x0 for b in boxes)>=0 and all(a.y1<=b.y0 or b.y1<=a.y0 for i,a in enumerate(boxes) for b in boxes[:i])
        assert max(len(line) for ax in axs for line in ax.get_xlabel().split('\n'))<=40
        plt.close(fig)

def test_no_interval_leaves_what_an_accuracy_can_be_and_zero_has_no_sign():
    told = text_cells(comparison(frame(dict(none=[.9,.99,.999], same=[.9,.99,.999-1e-9]))))
    assert '100.0]' in told.iloc[0,0] and not [cell for cell in told.to_numpy().flat if re.search(r'-0\.0+\b', str(cell))]
    losses = text_cells(comparison(frame(dict(none=[.9,.99,1.9])).rename(columns=dict(accuracy='loss')), metric='loss'))
    assert float(re.search(r', (.*)]', losses.iloc[0,0])[1])>2, 'a loss may be large'

def test_no_line_for_two_seeds():
    axs = plot_comparison(comparison(frame(dict(none=[.5,.6], up=[.9,1.]))))
    assert not any(len(seg) and np.isfinite(seg).all() for ax in axs for seg in ax.collections[0].get_segments())

def test_a_setting_may_be_what_is_compared():
    df = frame().assign(lam=lambda d: d.method.map(dict(none=0., up=.1, down=1., noisy=10.)))
    t = comparison(df, by='lam', baseline=0.)
    assert verdict(t).startswith('Best against 0.0: 0.1, +5.0 points') and 'vs 0.0, points' in as_markdown(t) and '0.1 ' in printed(t)
    t = comparisons(df.assign(data='x'), over='data', by='lam', baseline=0.)
    assert verdict(t).startswith('x: Best against 0.0: 0.1') and set(tick_names(plot_comparisons(t)[0,0]).values())=={'0.1','1.0','10.0'}


# Rows of many runs

def rows(settings, **kw):
    "Rows of runs as the store gives them"
    one = dict(data='digits', n_train=200, experiment='e', method='phantom', seed=0, accuracy=.5, status='done', lr=.01) | kw
    return pd.DataFrame([one | dict(settings=s, method='none' if s is None else 'phantom') | ({'settings':{}} if s is None else {}) for s in settings])

def test_names_hold_the_settings_that_vary_and_no_other():
    df,over = tell_apart(rows([None, dict(lam=.1, k=8, mode='mix'), dict(lam=.3, k=8, mode='mix'), dict(lam=.1, mode='mix')]))
    assert over==['data','n_train'] and df.method.tolist()==['none','phantom lam=0.1 k=8','phantom lam=0.3 k=8','phantom lam=0.1']
    same = pd.concat([rows([dict(lam=.1)]), rows([dict(lam=.3)], data='cifar10')]) # tuned by data set
    assert tell_apart(same.reset_index(drop=True))[0].method.tolist()==['phantom','phantom']

def test_parts_of_a_cross_validation_are_one_comparison():
    "They differ by some images; sizes that are asked for stay apart"
    sizes = [33,34,34,33,34]
    df = pd.concat([rows([None, {}], n_train=n, seed=seed, folds=5) for seed,n in enumerate(sizes)], ignore_index=True)
    assert set(tell_apart(df)[0].n_train)=={34} and df.n_train.nunique()==2 and tell_apart(df)[0].n_train.dtype=='int64'
    few = pd.concat([rows([None, {}], n_train=20, seed=seed, folds=5) for seed in range(5)], ignore_index=True)
    both = pd.concat([df, few], ignore_index=True)
    assert sorted(set(tell_apart(both)[0].n_train))==[20,34]
    assert sorted(set(tell_apart(df.assign(folds=0))[0].n_train))==[33,34] # a fixed test set

def test_all_of_the_images_and_as_many_are_one_comparison():
    df = pd.concat([rows([None, {}], seed=seed, key=f'{way}{seed}') for seed in range(3) for way in ('1000','all')], ignore_index=True)
    told,over = tell_apart(df)
    assert len(told)==6 and comparisons(told, over).runs.tolist()==[3,3]
    lost = df.assign(status=['failed' if key.startswith('1000') else 'done' for key in df.key])
    assert set(tell_apart(lost)[0].status)=={'done'}

def test_columns_that_differ_tell_comparisons_apart():
    df = pd.concat([rows([None, {}], model=m) for m in ('small_cnn','vgg')], ignore_index=True)
    assert tell_apart(df)[1]==['data','n_train','model']

@pytest.mark.parametrize('metric,words', [('accuracy','test accuracy'), ('valid_accuracy','validation accuracy'), ('train_loss','training loss'), ('gap','gap')])
def test_a_metric_is_named_with_its_images(metric, words): assert metric_words(metric)==words

def test_filters():
    df = rows([None, dict(lam=.1)])
    assert len(filter_rows(df, ['method=phantom','n_train=200']))==1 and len(filter_rows(df, None))==2
    for where,what in (('digits', 'write column=value'), ('dat=digits', "column='dat' .did you mean 'data'")):
        with pytest.raises(ValueError, match=what): filter_rows(df, [where])

def test_a_table_with_missing_runs_says_what_its_numbers_are():
    df = pd.concat([rows([None, {}], seed=seed) for seed in range(4)], ignore_index=True)
    assert 'own seeds' not in legend(comparison(df)) and 'own seeds' in legend(comparison(df.drop(7)))
    both = pd.concat([df, df.drop(7).assign(data='cifar10')], ignore_index=True)
    assert 'own seeds' in legend(comparisons(both, ['data']))

def test_the_baseline_stays_where_one_method_is_asked_for():
    df = pd.concat([rows([None, dict(lam=.1)]), rows([dict(lam=1)], method='other').assign(method='other')], ignore_index=True)
    assert filter_rows(df, ['method=phantom'], 'none').method.tolist()==['none','phantom']
    assert not len(filter_rows(df, ['method=phantm'], 'none')) # a slip shows nothing, not the baseline alone

def test_what_no_table_can_hold_is_counted_first(capsys):
    with pytest.raises(SystemExit) as e: cli.main(['results', 'results/atlas.jsonl'])
    out = capsys.readouterr().out
    counts = load_results('results/atlas.jsonl').groupby('experiment').size()
    assert e.value.code==0 and 'Choose one: --where experiment=atlas-' in out
    for name,n in counts.items(): assert [str(n)]==[line.split()[1] for line in out.splitlines() if line.split()[:1]==[name]]
    with pytest.raises(SystemExit): cli.main(['results', 'results/atlas.jsonl', '--where', 'experiment=atlas-digits-200', '--where', 'method=sam'])
    out = capsys.readouterr().out
    assert 'sam rho=' in out and out.count('none ') and 'mixup' not in out and 'Choose one' not in out

@pytest.mark.parametrize('metric,up,words', [('accuracy',None,''), ('similarity',None,'Lower similarity counts'), ('loss',None,'Lower loss counts'),
    ('accuracy',False,'Lower accuracy counts as better, as asked for'), ('within',None,'No direction is known for within: higher'), ('within',False,'Lower within')])
def test_the_direction_is_said(metric, up, words): assert direction_words(metric, up).startswith(words) and bool(words)==bool(direction_words(metric, up))

def test_results_are_shown_with_their_direction():
    console = Console(width=140, record=True, file=open('/dev/null', 'w'))
    df = frame(data='digits', n_train=200).rename(columns=dict(accuracy='similarity')).assign(settings=[{}]*16, status='done')
    table = show_results(df, console, metric='similarity')
    text = console.export_text()
    assert table.verdict.xs('down', level='method').item()=='better' and 'Lower similarity counts as better.' in text and '(lower is better)' in text
    with pytest.raises(ValueError, match="baseline='non'.*did you mean 'none'"): show_results(df, console, metric='similarity', baseline='non')

def test_the_front_figure_draws_every_setting_and_says_what_was_not_run(tmp_path):
    some = dict(a=dict(diff=2., half=0.4), b=dict(diff=-.02, half=0.2))
    table = dict(settings={name:dict(about=f'setting {name}') for name in 'ab'},
        methods=dict(good=dict(helps='yes', effects=some), other=dict(helps='unclear', effects=dict(a=dict(diff=.3, half=0.6)))))
    axs = front_figure(table, tmp_path/'front.png')
    words = [[text.get_text() for text in ax.texts] for ax in axs.flat]
    assert axs.shape==(1,2) and words==[['+0.3','+2.0'], ['under 3 seeds','+0.0']] and (tmp_path/'front.png').stat().st_size>5000
    assert [ax.get_title(loc='left') for ax in axs.flat]==['setting a','setting b'] and list(tick_names(axs[0,0]).values())==['other','good']
    assert axs[0,0].lines[-1].get_color()==BETTER

def test_the_front_figure_is_not_ruled_by_a_ruin_nor_by_a_setting_of_one_method():
    effects = [dict(a=dict(diff=2., half=0.4)), dict(a=dict(diff=-65., half=18)), dict(a=dict(diff=.5, half=0.4), b=dict(diff=0., half=0.2))]
    table = dict(settings={name:dict(about=name) for name in 'ab'},
        methods={f'm{i}':dict(helps='unclear', effects=some) for i,some in enumerate(effects)})
    axs = front_figure(table)
    low,high = axs[0,0].get_xlim()
    assert axs.shape==(1,1) and (low,high)==(-1.5,3.5)
    assert [line.get_xdata()[0] for line in axs[0,0].lines if line.get_marker()=='<']==[low] and '-65.0' in {text.get_text() for text in axs[0,0].texts}

def test_one_lucky_seed_is_not_the_best_method():
    "A method of which two runs failed is shown, but not named before those with all seeds"
    df = frame()
    lucky = df[(df.method=='up') & (df.seed==df.seed.min())].assign(method='lucky', accuracy=.999)
    assert 'Best against none: up,' in verdict(comparison(pd.concat([df, lucky])))

def test_a_failed_run_says_why_and_how_it_is_tried_again(tmp_path):
    runs = [Run(), Run(seed=1)]
    (tmp_path/'runs').mkdir()
    for run in runs:
        row = {**asdict(run), 'settings':{}, 'key':run.key, 'status':'failed', 'error':'OSError: [disk] is full', 'accuracy':None}
        (tmp_path/'runs'/f'{run.name}.json').write_text(json.dumps(row))
    console = Console(record=True, width=300)
    show_comparison(runs, tmp_path, console)
    text = console.export_text()
    assert '2 of 2 runs did not finish (failed)' in text and 'OSError: [disk] is full. To try a failed run again, delete its file in' in text

def test_one_style():
    nbs = Path(__file__).parent.parent/'nbs'/'house.mplstyle'
    import phantom_nb
    assert nbs.read_text()==(Path(phantom_nb.__file__).parent/'house.mplstyle').read_text()
    with plt.rc_context():
        house_style()
        assert plt.rcParams['figure.dpi']==110 and plt.rcParams['axes.prop_cycle'].by_key()['color'][0].lower()=='#0072b2'

def test_a_comparison_that_was_stopped_before_its_first_run_says_so(tmp_path):
    "The folder of runs is there, and nothing in it yet"
    (tmp_path/'runs').mkdir()
    console = Console(record=True, width=100)
    show_comparison([Run()], tmp_path, console)
    assert 'No run is finished yet' in console.export_text()

def test_a_missing_interval_is_explained():
    "All seeds differ by the same amount: said in words and under the table; one seed is another matter"
    rows = [dict(method=m, seed=i, status='done', accuracy=.5+.1*(m=='mhe')+.01*i) for m in ('none','mhe') for i in range(3)]
    same = pd.DataFrame(rows).assign(accuracy=lambda d: d.accuracy.round(2), seconds=1., train_accuracy=1.)
    same.loc[same.method=='mhe','accuracy'] = same[same.method=='none'].accuracy.values+.125
    table = comparison(same)
    assert pd.isna(table.diff_low['mhe']), "exactly equal differences have no interval"
    assert 'the same for all seeds' in legend(table) and 'the same for all seeds' in verdict(table)
    assert 'the same for all seeds' not in legend(comparison(same[same.seed==0]))

def test_epochs_are_named_where_they_go_with_something_else():
    "Other epochs, and other training images with them"
    told = [dict(experiment='compare', data='digits', n_train=n, method=m, seed=i, settings={}, status='done', accuracy=.5+.01*i, epochs=e, n_valid=v)
        for n,e,v in ((100,3,0), (80,9,20)) for m in ('none','mhe') for i in range(3)]
    assert tell_apart(pd.DataFrame(told))[1]==['data','n_train','epochs']
    assert tell_apart(pd.DataFrame(told[:6]))[1]==['data','n_train']
    assert tell_apart(pd.DataFrame(told).assign(n_train=100))[1]==['data','n_train','epochs'], "epochs tell more than n_valid"

def test_why_nothing_can_be_compared():
    df = frame()
    df = df.assign(status=df.method.map(lambda m: 'diverged' if m=='none' else 'done'))
    assert 'none of its 4 runs is finished' in verdict(comparison(df))
    assert 'no run of it is here' in verdict(comparison(df[df.method!='none']))
