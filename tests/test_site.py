"The docs site in a real browser: pages load, links lead somewhere, pictures show, mathematics is typeset."
import os, re, shutil, subprocess, sys
from contextlib import contextmanager
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urldefrag, urljoin

import pytest
from test_project import NBS, ROOT, copy_tree, tool

CDN = 'https://cdn.jsdelivr.net/npm/katex@'
ARGS = '--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync'.split()
PAGES = {p.relative_to(ROOT/'nbs').with_suffix('.html').as_posix():p for p in NBS}
VISITED = ['index.html', 'core.html', 'plain.html', 'regularizers/energy.html', 'regularizers/comhe.html',
    'regularizers/phantom.html', 'regularizers/flatness.html', 'measures/sparsity.html', 'papers/sparsity.html']


def needed(what, found):
    "Skip where a tool is missing, but fail on CI, where it has to be there."
    if found: return found
    (pytest.fail if os.environ.get('CI')=='true' else pytest.skip)(f'{what} is missing: .ci/run installs it on Debian')

@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "The folder of the built site: $SITE where it was built just now, else built from a copy of the project."
    if os.environ.get('SITE'): return (ROOT/os.environ['SITE']).resolve()
    root = copy_tree(tmp_path_factory.mktemp('project'))
    tool(root, sys.executable, '-W', 'ignore', 'tests/docs.py')
    return root/'_docs'

class Page(HTMLParser):
    "The links, the identifiers and the pictures of a page."
    def __init__(self, path):
        super().__init__()
        self.links,self.ids,self.images = [],set(),[]
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if 'id' in attrs: self.ids.add(attrs['id'])
        if tag=='a' and attrs.get('href'): self.links.append(attrs['href'])
        if tag=='img': self.images.append(attrs.get('src') or '')

@pytest.fixture(scope='session')
def pages(site): return {p.relative_to(site).as_posix():Page(p) for p in site.rglob('*.html')}


def test_every_notebook_is_a_page(pages): assert PAGES.keys()<=pages.keys()

def test_links_and_anchors_lead_somewhere(site, pages):
    dead = []
    for name,page in pages.items():
        for href in page.links:
            if re.match(r'[a-z]+:|//', href): continue
            to,anchor = urldefrag(urljoin(f'/{name}', href))
            to = unquote(to).lstrip('/') or 'index.html'
            if to.endswith('/'): to += 'index.html'
            if not (site/to).is_file(): dead.append((name, href))
            elif anchor and to in pages and unquote(anchor) not in pages[to].ids: dead.append((name, href))
    assert not dead, dead

def test_pictures_are_there(site, pages):
    for name,page in pages.items():
        for src in page.images:
            if src.startswith('data:image/'): assert len(src)>200, f'{name}: an empty picture'
            elif not re.match(r'[a-z]+:', src): assert ((site/name).parent/unquote(src)).stat().st_size>0, (name, src)


@pytest.fixture(scope='session')
def katex(site, tmp_path_factory):
    "The folder of the KaTeX that the pages ask a CDN for, from npm."
    versions = {v for p in site.rglob('*.html') for v in re.findall(rf'{CDN}([\d.]+)', p.read_text(encoding='utf-8'))}
    if not versions: pytest.fail('no page has mathematics')
    npm,to = needed('npm', shutil.which('npm')),tmp_path_factory.mktemp('npm')
    cmd = [npm, 'install', '--prefix', str(to), '--no-audit', '--no-fund', f'katex@{versions.pop()}']
    out = subprocess.run(cmd, cwd=to, capture_output=True, text=True)
    needed(f'katex from npm ({out.stderr.strip()[-200:]})', out.returncode==0)
    return to/'node_modules/katex'

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@contextmanager
def serve(folder):
    "Serve a folder on a free port of this machine."
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}'
    finally: server.shutdown()

@pytest.fixture(scope='session')
def browser(site, katex):
    "A function that opens a page of the site and returns it with what went wrong on it."
    sync = pytest.importorskip('playwright.sync_api').sync_playwright
    exe = needed('chromium', shutil.which('chromium') or shutil.which('chromium-browser'))
    with serve(site) as url, sync() as p:
        chromium = p.chromium.launch(executable_path=exe, args=ARGS)
        context = chromium.new_context(viewport=dict(width=1400, height=1000))

        def answer(route):
            "Give KaTeX from npm's files, and nothing else from outside."
            if not route.request.url.startswith(CDN): return route.abort()
            route.fulfill(path=katex/re.sub(r'^[\d.]+/', '', route.request.url.removeprefix(CDN)))

        context.route(lambda to: not to.startswith(url), answer)

        def visit(name):
            page,errors = context.new_page(),[]
            page.on('pageerror', lambda e: errors.append(str(e)))
            page.on('response', lambda r: r.status>=400 and errors.append(f'{r.status} {r.url}'))
            response = page.goto(f'{url}/{name}', wait_until='load')
            assert response.status==200
            return page,errors

        yield visit
        chromium.close()

@pytest.mark.parametrize('name', VISITED)
def test_page_loads_without_errors(browser, name):
    page,errors = browser(name)
    assert page.locator('h1').first.is_visible() and 'phantom_nb' in page.title()
    assert not errors, errors
    page.close()

def test_sidebar_shows_every_page_and_each_link_works(browser):
    page,_ = browser('index.html')
    links = page.locator('#quarto-sidebar a.sidebar-link')
    hrefs = {links.nth(i).get_attribute('href') for i in range(links.count())} - {None}
    assert {re.sub(r'^\./', '', h) for h in hrefs}>=PAGES.keys()
    for href in PAGES:
        opened,errors = browser(href)
        assert opened.locator('h1').first.inner_text() and not errors, (href, errors)
        opened.close()
    page.locator('#quarto-sidebar a.sidebar-link', has_text='The base class').first.click()
    page.wait_for_url('**/core.html')
    page.close()

@pytest.mark.parametrize('name', VISITED)
def test_pictures_are_drawn(browser, name):
    page,_ = browser(name)
    sizes = page.eval_on_selector_all('main img', 'is => is.map(i => [i.complete, i.naturalWidth, i.naturalHeight])')
    assert all(done and w>1 and h>1 for done,w,h in sizes), sizes
    page.close()

def test_mathematics_is_typeset(browser):
    page,errors = browser('regularizers/energy.html')
    page.wait_for_selector('.katex-html', state='attached')
    assert page.locator('.katex').count()>5 and page.locator('.katex-display').count()>0
    assert page.locator('.katex-error').count()==0, page.locator('.katex-error').first.get_attribute('title')
    box = page.locator('.katex-display').first.bounding_box()
    assert box['width']>50 and box['height']>10 and not errors
    left = page.locator('main').inner_text()
    assert '$$' not in left and '\\frac' not in left.replace(page.locator('.katex-mathml').first.inner_text(), '')
    page.close()

def test_code_stands_on_its_page_and_source_links_lead_to_the_line(browser, site):
    "Private mathematics is shown, and a click on [source] lands on the definition"
    page,errors = browser('regularizers/energy.html')
    assert 'def _psi(' in page.locator('main').inner_text() and 'def _energy_grad(' in page.locator('main').inner_text()
    link = page.locator('a', has_text='source').filter(visible=True).first
    href = link.get_attribute('href')
    lines = (site/'regularizers'/href.partition('#')[0]).resolve()
    module,number = lines.relative_to((site/'source').resolve()).with_suffix('.py'),int(href.rpartition('-')[2])
    assert re.match(r'(@|class |def )', (ROOT/module).read_text(encoding='utf-8').splitlines()[number-1])
    opened,errors = browser(os.path.relpath(lines, site.resolve()))
    assert opened.locator(f'#L-{number}').count()==1 and not errors
    opened.close()
    page.close()

@pytest.mark.parametrize('name', VISITED)
def test_nothing_is_cut_off_at_the_side(browser, name):
    "Code, tables and equations fit the column or scroll inside it"
    page,_ = browser(name)
    width = page.evaluate('[document.documentElement.scrollWidth, window.innerWidth]')
    cut = page.eval_on_selector_all('main pre', 'ps => ps.filter(p => p.scrollWidth>p.clientWidth+2).length')
    assert width[0]<=width[1]+1 and cut==0, (width, cut)
    page.close()

def test_search_finds_a_function(site): assert 'create_model' in (site/'search.json').read_text(encoding='utf-8')
