"Packaging of llmft: every value comes from settings.ini; pyproject.toml holds what build tools must read without running code."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here / 'settings.ini', encoding='utf-8')
settings = config['DEFAULT']
first, last = (int(settings[key].split('.')[1]) for key in ('min_python', 'max_python'))


def requirements(key):
    "The space-separated requirements that `key` of settings.ini holds."
    return settings.get(key, '').split()


setup(
    name=settings['lib_name'],
    version=settings['version'],
    description=settings['description'],
    long_description=(here / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    url=settings['git_url'],
    project_urls={'Documentation': settings['doc_host'] + settings['doc_baseurl']},
    author=settings['author'],
    author_email=settings['author_email'],
    keywords=settings['keywords'].split(),
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        *(f'Programming Language :: Python :: 3.{minor}' for minor in range(first, last + 1)),
    ],
    packages=find_packages(include=['llmft', 'llmft.*']),
    package_data={'llmft': ['assets/**/*']},
    include_package_data=False,
    python_requires=f'>=3.{first},<3.{last + 1}',
    install_requires=requirements('requirements'),
    extras_require={
        name: requirements(f'{name}_requirements')
        for name in ('dev', 'docs', 'bench', 'llama-cpp', 'forecast', 'zero', 'cluster', 'trackers', 'lm-eval')
    },
    entry_points={'console_scripts': settings['console_scripts'].split(), 'nbdev': ['llmft=llmft._modidx:d']},
    zip_safe=False,
)
