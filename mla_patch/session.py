"""What one process does about its hosts: plugins, flags, patcher and report, and what it says of them.

Imported when a host appears, or when somebody calls. As in ``startup``, nothing here takes a lock.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from mla_patch.imports import when_imported

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mla_patch.eligibility import Eligibility
    from mla_patch.experiment.feature import FeatureExperiment
    from mla_patch.experiment.live import ExperimentSession
    from mla_patch.features import Feature
    from mla_patch.flags import Flags, Setting
    from mla_patch.plugins import Plugins
    from mla_patch.reports import Writer


class Session:
    """Plugins, flags, patcher and report of this process."""

    def __init__(self, plugins: Plugins, environ: Mapping[str, str], directory: str | None) -> None:
        from mla_patch import flags
        from mla_patch.patcher import Patcher
        from mla_patch.reports import ProcessReport

        self.plugins = plugins
        self.environ = environ
        self.directory = directory  # in which this process started, as far as can be told
        self.flags: Flags = flags.read(environ, plugins.features, start=directory)
        self.report: ProcessReport = ProcessReport(problems=[*plugins.problems, *self.flags.problems])
        self.writer: Writer | None = None
        self.patcher: Patcher = Patcher(plugins.arms, self.flags.on("MLA_PATCH_STRICT"), self._changed)
        self.report.look = self._look
        self.experiments: ExperimentSession | None = None  # experiments, if any
        self.once: dict[str, Any] = {}  # what is done once, by whoever comes first
        self.ended = ""  # strict's reason

    def begin(self) -> None:
        """This session has become the process's own: what is set for the whole process."""
        from mla_patch.compat.compiles import COMPILES

        self.report.problems += self.plugins.begin()
        COMPILES.has_served = self.report.has_served
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    def first(self, what: str) -> bool:
        """Whether nobody has asked this before."""
        own = object()
        return self.once.setdefault(what, own) is own

    def on_host_import(self, package: str) -> None:
        """The features of one host, at the moment of its import."""
        from mla_patch import endings

        if self.ended:  # somebody has swallowed it, and imports the host once more
            endings.end(self.ended)
        if not self.first(package):
            return
        self.report.engine = self.report.engine or package
        self._start_writer()
        try:
            self.activate({}, "", lambda feature: _package(feature.host_name) == package)
            self._miss(package)
        except endings.StrictExit as end:
            self.ended = str(end)
            raise
        when_imported(package, lambda module: self._announce(package))

    def _miss(self, package: str) -> None:
        """Say what is asked for, is not for this host, and cannot be had of another host on this machine either.

        Another host may still be imported by this process; the feature is its own then.
        """
        from mla_patch.eligibility import Eligibility, check
        from mla_patch.features import SATISFIED

        here = [feature.name for feature in self.plugins.features if _package(feature.host_name) == package]
        skip = self.flags.on("MLA_PATCH_SKIP_VERSION_CHECK")
        lost: dict[str, list[tuple[Feature, Setting, Eligibility]]] = {}
        for feature in self.plugins.features:
            setting = self.flags.feature(feature)
            if setting.asked_for and setting.value != "off" and feature.name not in here:
                found = find_host(feature.host_name)
                checked = check(feature, setting, found, skip_version_check=skip)
                lost.setdefault(feature.name, []).append((feature, setting, checked))
        for rows in lost.values():
            if not any(checked.state in SATISFIED for _, _, checked in rows):
                feature, setting, checked = rows[0]
                # without the modules that its host would import: there is no later moment to say it
                self._apply(feature, setting, Eligibility(checked.state, checked.reason))

    def _announce(self, package: str) -> None:
        """One line in the log, at the end of the host's import: what is active, what is not and why, where it is told.

        Engines set their logging up later. Where nobody has, the line goes to stderr as it is, and no handler stays.
        """
        import logging

        import mla_patch
        from mla_patch import endings

        try:
            rows = [status for status in self.report.features if _package(status.host) == package]
            if not rows and not self.first("announced"):
                return  # a host without features of ours, imported by one that has some
            self.first("announced")
            states: dict[str, list[str]] = {"applied": [], "armed": [], "native": []}  # these come first
            for status in rows:
                why = "" if status.satisfied and str(status.state) != "native" else f" ({_short(status.reason)})"
                states.setdefault(str(status.state), []).append(status.name + why)
            found = find_host(package)
            version = (found.version if found is not None else None) or "of unknown version"
            parts = [f"{state}: {', '.join(names)}" for state, names in states.items() if names]
            told = "no report: MLA_PATCH_REPORT is not set"
            if self.writer:
                problem = self.writer.problem()
                told = f"no report: {problem}" if problem else f"report: {self.writer.path}"
            text = "; ".join([*(parts or ["no feature is for this engine"]), told])
            text = f"mla-patch {mla_patch.__version__}, {package} {version}: {text}"
            log = logging.getLogger("mla_patch")
            if log.hasHandlers():
                log.info("%s", text)
            elif log.level <= logging.INFO and sys.stderr is not None:
                sys.stderr.write(f"{text}\n")
        except BaseException as problem:  # a closed stream, say: nothing of ours fails the host's import
            endings.pass_on(problem)

    def check(self, names: tuple[str, ...]) -> None:
        from mla_patch.flags import nearest

        known = [name for feature in self.plugins.features for name in (feature.name, feature.label)]
        for name in names:
            if name not in known:
                raise ValueError(
                    f"{name!r} is not a feature{nearest(name, known)}; there are {', '.join(known[1::2]) or 'none'}"
                )

    def activate(self, chosen: Mapping[str, str], chosen_by: str, wanted: Any) -> None:
        """Judge the wanted features and hand them to the patcher."""
        from mla_patch import flags
        from mla_patch.eligibility import Eligibility, check
        from mla_patch.features import State

        self._tell_problems()
        settings = flags.read(self.environ, self.plugins.features, chosen, chosen_by, self.directory)
        skip = self.flags.on("MLA_PATCH_SKIP_VERSION_CHECK")
        hosts: dict[str, Any] = {}  # looked up once, however many features a host has
        for feature in filter(wanted, self.plugins.features):
            setting = settings.feature(feature)
            if feature.host_name not in hosts:
                hosts[feature.host_name] = find_host(feature.host_name)
            found = hosts[feature.host_name]
            self.report.engine = self.report.engine or (found.host.package if found else "")
            if found is not None and found.host.package == self.report.engine:
                self.report.host_version = found.version
            checked = check(feature, setting, found, skip_version_check=skip)
            under_test = None
            if setting.value in flags.EXPERIMENTS and checked.state is State.ARMED:
                try:
                    under_test = self._test(feature, setting, settings, checked)
                except ValueError as problem:
                    checked = Eligibility(State.REFUSED, str(problem), watch=[t.module for t in checked.targets])
            self._apply(feature, setting, checked, under_test)

    def _apply(
        self, feature: Feature, setting: Setting, checked: Eligibility, under_test: FeatureExperiment | None = None
    ) -> None:
        try:
            self.patcher.apply(feature, setting, checked, under_test)
        finally:
            self._list_features()
            self._start_writer()
            self._changed()

    def _look(self) -> None:
        self.patcher.look()
        self._list_features()  # of two threads that apply features at once the slower one may have listed fewer

    def _list_features(self) -> None:
        self.report.features = [run.status for run in self.patcher.runs.copy().values()]

    def _test(self, feature: Feature, setting: Setting, settings: Flags, checked: Eligibility) -> FeatureExperiment:
        """Put a feature under test; ValueError: it cannot be, with the reason."""
        from mla_patch.experiment.live import ExperimentSession

        values = experiment(feature, setting, settings, checked, self.plugins)
        experiments: ExperimentSession = ExperimentSession(settings.text("MLA_PATCH_REPORT"), lambda: self.report.stem)
        self.experiments = experiments = self.once.setdefault("experiments", experiments)
        return experiments.add(*values)

    def _tell_problems(self) -> None:
        import logging

        from mla_patch import endings

        if not self.first("problems"):
            return
        for problem in self.report.problems:
            if self.flags.on("MLA_PATCH_STRICT"):
                endings.end(f"mla-patch: {problem}")
            logging.getLogger("mla_patch").warning("mla-patch: %s", problem)

    def _start_writer(self) -> None:
        from mla_patch.reports import Writer

        directory = self.flags.text("MLA_PATCH_REPORT")
        if directory and self.report.engine and self.first("writer"):
            self.writer = Writer(directory, self.report)

    def _changed(self) -> None:
        if self.writer is not None:
            self.writer.changed()

    def _forked(self) -> None:
        self.patcher.forked()
        self.report.renew()
        if self.writer is not None:
            self.writer.restart()
        if self.experiments is not None:
            self.experiments.forked()


def experiment(
    feature: Feature, setting: Setting, settings: Flags, checked: Eligibility, plugins: Plugins
) -> tuple[str, str, str, str, tuple[str, ...]]:
    """What `ExperimentSession.add` takes to put ``feature`` under test.

    Raises:
        ValueError: it cannot be; says why.
    """
    from mla_patch.experiment.feature import FeatureExperiment
    from mla_patch.experiment.live import ExperimentSession

    if "shadow" in setting.value:
        for target in checked.targets:
            if target.kind != "edit" and target.shadow_clone is None:
                raise ValueError(
                    f"{setting.name}={setting.value}: {target.name} does not say what it writes (shadow_clone)"
                )
    more = tuple(arm.name for arm in plugins.arms if feature.matches(arm.feature))
    values = feature.name, setting.value, settings.text("MLA_PATCH_AB"), settings.text("MLA_PATCH_SHADOW"), more
    FeatureExperiment(ExperimentSession(settings.text("MLA_PATCH_REPORT"), str), *values)
    return values


def find_host(name: str) -> Any:
    """The installed host of that name, or None; imports nothing of it."""
    from mla_patch import sources
    from mla_patch.compat import hosts

    known = hosts.host(name)
    spec = sources.find_package(known.package)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return hosts.installed(known, places[0] if places else None)


def _short(reason: str) -> str:
    """The beginning of a reason; all of it is in the report."""
    first = " ".join(reason.partition("; ")[0].split())
    return first if len(first) <= 80 else f"{first[:77]}..."


def _package(host_name: str) -> str:
    from mla_patch.compat import hosts

    return hosts.host(host_name).package
