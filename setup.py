"""Only what pyproject.toml cannot say: the packages are klab.kernels and klab.harness, found in the top-level folders."""

from setuptools import find_packages, setup

rooms = {"klab.kernels": "kernels", "klab.harness": "harness"}
setup(
    packages=[name for prefix, folder in rooms.items() for name in (prefix, *(f"{prefix}.{p}" for p in find_packages(folder)))]
    + ["klab.profiles"],
    package_dir=rooms | {"klab.profiles": "profiles"},
    package_data={
        "klab.profiles": ["*/*.toml", "*/*.csv", "*/*.json", "tuned/*/*.json", "acceptance/*/*.json"],
        "klab.kernels": ["*.cuh"],
        "klab.harness": ["report/*", "report/script/*"],
    },
)
