"""Images that lists, Kubernetes objects, Compose files and the output of Helm name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mirror.operations import image_lists
from mirror.operations.image_lists import ImageList, add_documents, add_file, add_lines, find_files


def names(text: str, environ: dict[str, str] | None = None) -> list[str]:
    found = read(text, environ)
    assert found.problems == []
    return [str(image) for image in found.images]


def read(text: str, environ: dict[str, str] | None = None) -> ImageList:
    found = ImageList()
    add_documents(found, text, "f.yaml", environ or {})
    return found


def workload(kind: str, spec: str) -> str:
    return f"apiVersion: v1\nkind: {kind}\nmetadata: {{name: x}}\n{spec}\n"


POD = "{initContainers: [{image: 'i:1'}], containers: [{image: 'c:1'}, {name: none}]}"
ALL = ["docker.io/library/i:1", "docker.io/library/c:1"]


@pytest.mark.parametrize(
    "kind", ["Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job", "Rollout"]
)
def test_pod_template_of_each_workload_is_read(kind: str) -> None:
    assert names(workload(kind, f"spec: {{template: {{spec: {POD}}}}}")) == ALL


def test_pod_cron_job_and_pod_template_are_read() -> None:
    assert names(workload("Pod", f"spec: {POD}")) == ALL
    job = f"spec: {{jobTemplate: {{spec: {{template: {{spec: {POD}}}}}}}}}"
    assert names(workload("CronJob", job)) == ALL
    assert names(workload("PodTemplate", f"template: {{spec: {POD}}}")) == ALL


def test_ephemeral_containers_and_image_volumes_are_read() -> None:
    pod = (
        "spec: {containers: [{image: a}], ephemeralContainers: [{image: 'ghcr.io/o/debug:1'}], "
        "volumes: [{name: x, emptyDir: {}}, {name: m, image: {reference: 'quay.io/o/model:2'}}]}"
    )
    assert names(workload("Pod", pod)) == [
        "docker.io/library/a:latest",
        "ghcr.io/o/debug:1",
        "quay.io/o/model:2",
    ]


def test_lists_are_read_also_nested_and_without_a_kind() -> None:
    pod = f"{{apiVersion: v1, kind: Pod, spec: {POD}}}"
    inner = f"{{apiVersion: v1, kind: PodList, items: [{pod}]}}"
    assert names(f"apiVersion: v1\nkind: List\nitems: [{inner}, text]\n") == ALL
    assert names(f"[{pod}]") == ALL


def test_objects_without_pods_and_other_documents_are_passed_over() -> None:
    assert names(workload("Service", "spec: {ports: [{port: 80}]}")) == []
    assert names(workload("ConfigMap", "data: {image: nginx}")) == []
    assert names("image: {repository: nginx, tag: '1'}\nreplicas: 2\n") == []
    assert names("just text") == []


def test_output_of_helm_template_is_read_with_each_image_once() -> None:
    one = workload("Deployment", f"spec: {{template: {{spec: {POD}}}}}")
    text = f"---\n# Source: chart/templates/a.yaml\n{one}\n---\n# Source: b.yaml\n\n---\n{one}"
    assert names(text) == ALL
    assert read(text).images[next(iter(read(text).images))].startswith("f.yaml: spec.template")


def test_image_of_a_later_document_is_named_by_its_number() -> None:
    found = read("a: b\n---\n" + workload("Pod", "spec: {containers: [{image: 'A B'}]}"))
    assert found.problems[0].startswith("f.yaml: document 2: spec.containers[0].image: 'A B' is no")


COMPOSE = """
x-base: &base {image: "ghcr.io/o/base:1"}
services:
  web: {image: "nginx:${TAG:-1.27}"}
  api: {<<: *base, environment: {A: b}}
  own: {build: ., image: own}
  db: {image: $REGISTRY/db:1}
"""


def test_compose_services_are_read_with_variables_and_without_builds() -> None:
    assert names(COMPOSE, {"REGISTRY": "quay.io/o"}) == [
        "docker.io/library/nginx:1.27",
        "ghcr.io/o/base:1",
        "quay.io/o/db:1",
    ]
    assert names(COMPOSE, {"REGISTRY": "r.example", "TAG": "2"})[0].endswith("nginx:2")


def test_compose_variable_that_is_not_set_is_a_problem() -> None:
    found = read(COMPOSE)
    assert found.problems == ["f.yaml: services.db.image: the variable REGISTRY is not set"]
    assert len(found.images) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${A-x}", "x"),
        ("${E-x}", ""),
        ("${E:-x}", "x"),
        ("${B:+y}", "y"),
        ("${A:+y}", ""),
        ("$$B$B", "$Bb"),
        ("${B:?must be set}", "b"),
    ],
)
def test_compose_variables_follow_the_specification(text: str, expected: str) -> None:
    assert image_lists._interpolate(text, {"B": "b", "E": ""}) == expected


def test_template_that_was_not_rendered_is_a_problem_with_the_remedy() -> None:
    braces = read(workload("Pod", "spec: {containers: [{image: '{{ .Values.image }}'}]}"))
    mapping = read(workload("Pod", "spec:\n  containers:\n  - image: {{ .Values.image }}"))
    broken = read("{{- if .Values.x }}\nkind: Pod\n{{- end }}\n")
    for found in (braces, mapping, broken):
        assert found.images == {}
        assert len(found.problems) == 1
        assert "helm template" in found.problems[0]


def test_broken_document_is_one_line_and_those_before_it_count() -> None:
    found = read(workload("Pod", f"spec: {POD}") + "---\na: [b\n")
    assert list(map(str, found.images)) == ALL
    assert len(found.problems) == 1
    assert found.problems[0].startswith("f.yaml:7: not YAML")


def test_terminal_sequences_in_names_are_escaped() -> None:
    found = read('apiVersion: v1\nkind: Pod\nspec: {containers: [{image: "a\\e[31m"}]}\n')
    assert "\x1b" not in found.problems[0]


# --- files ----------------------------------------------------------------------------------------


def test_directory_gives_its_files_in_order_without_hidden_directories(tmp_path: Path) -> None:
    for name in ("b.yml", "a.yaml", "sub/c.json", ".git/d.yaml", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = ImageList()
    files = find_files(tmp_path, found)
    assert [str(file.relative_to(tmp_path)) for file in files] == ["a.yaml", "b.yml", "sub/c.json"]
    assert find_files(tmp_path / "README.md", found) == [tmp_path / "README.md"]
    assert found.problems == []


def test_pipe_in_a_directory_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("x")
    os.mkfifo(tmp_path / "b.yaml")
    assert find_files(tmp_path, ImageList()) == [tmp_path / "a.yaml"]


def test_directory_without_manifests_and_too_many_files_are_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ImageList()
    assert find_files(tmp_path, found) == []
    assert found.problems == [f"{tmp_path}: has no .yaml, .yml or .json file"]
    monkeypatch.setattr(image_lists, "MAX_FILES", 2)
    for number in range(3):
        (tmp_path / f"{number}.yaml").write_text("x")
    assert len(find_files(tmp_path, found)) == 2
    assert "more than 2 files" in found.problems[1]


def test_file_that_cannot_be_read_is_a_problem_and_the_others_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_lists, "MAX_MANIFESTS_BYTES", 1000)
    (tmp_path / "large.yaml").write_text("# " + "x" * 2000)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    (tmp_path / "good.yaml").write_text(workload("Pod", f"spec: {POD}"))
    found = ImageList()
    for name in ("missing.yaml", "large.yaml", "latin.yaml", "good.yaml"):
        add_file(found, tmp_path / name, {})
    assert list(map(str, found.images)) == ALL
    assert [problem.removeprefix(f"{tmp_path}/") for problem in found.problems] == [
        "missing.yaml: No such file or directory",
        "large.yaml: larger than 1000 bytes",
        "latin.yaml: not UTF-8 at byte 3",
    ]


def test_list_of_lines_has_comments_and_reports_bad_names() -> None:
    found = ImageList()
    add_lines(found, "# all\nnginx\n\nghcr.io/o/a:1 # why\nA/B\nnginx:latest\n", "list")
    assert list(map(str, found.images)) == ["docker.io/library/nginx:latest", "ghcr.io/o/a:1"]
    (problem,) = found.problems
    assert problem.startswith("list:5: 'A/B' is no image name: not a repository name: it has lower")
