"""Make distilled images: recover them, or select real ones; then gather the shards into one set."""

import math


def shard_members(w):
    """The classes and the image numbers within each class that a shard holds."""
    classes, ipc, shard = class_total(w.dataset), int(w.ipc), int(w.shard)
    method = method_of(w)
    if method["kind"] != "recover":
        return {"classes": list(range(classes)), "images": list(range(ipc))}
    if method["batch_layout"] == "whole_classes":
        size = max(1, method["batch_size"] // ipc)
        return {"classes": list(range(classes))[shard * size : (shard + 1) * size], "images": list(range(ipc))}
    size = min(classes, method["batch_size"])
    image, block = divmod(shard, math.ceil(classes / size))
    return {"classes": list(range(classes))[block * size : (block + 1) * size], "images": [image]}


def shard_total(w):
    """Number of shards of a distilled set."""
    classes, ipc = class_total(w.dataset), int(w.ipc)
    method = method_of(w)
    if method["kind"] != "recover":
        return 1
    if method["batch_layout"] == "whole_classes":
        return math.ceil(classes / max(1, method["batch_size"] // ipc))
    return ipc * math.ceil(classes / method["batch_size"])


# ---- recover ---------------------------------------------------------------------------------


def uses_features(method):
    """Whether recovery draws real features: for the terms that compare sets."""
    return method["feature_term"] in ("mmd_linear", "mmd_rbf", "sliced_wasserstein")


def recover_images_input(w):
    method, teacher = method_of(w), teacher_of(w)
    place = {"dataset": w.dataset, "teacher": teacher, "ipc": w.ipc, "barycenter": method.get("barycenter")}
    files = {
        "description": DESCRIPTION.format(**place),
        "teacher": TEACHER.format(**place),
        "statistics": BN_STATISTICS.format(**place),
    }
    if method.get("barycenter") and method["feature_term"] == "barycenter":
        blocks = dict.fromkeys(block_of(c, w.dataset) for c in shard_members(w)["classes"])
        files["barycenters"] = [BARYCENTER.format(**place, block=b) for b in blocks]
    if uses_features(method):
        files |= {"features": FEATURES.format(**place), "index": FEATURE_INDEX.format(**place)}
    if method["start"] == "real":
        files["train"] = real_images(w)
    return files


@settings_for
def recover_images_settings(w):
    return {
        "flip": entry("datasets", w.dataset, w.dataset).get("flip", True),
        **without(method_of(w), "kind", "label", "teacher", "barycenter", "swept", "batch_size", "batch_layout"),
        "members": shard_members(w),
        "seed": config["seed"],
    }


rule recover_images:
    input:
        unpack(recover_images_input),
    output:
        shard=SHARD,
    wildcard_constraints:
        method=methods_of_kind("recover"),
    params:
        settings=settings_of("recover_images"),
        code=code_of("recover_images"),
        job=describe_job,
    log:
        log_of("recover_images", "{dataset}/{method}/ipc{ipc}/shard{shard}"),
    benchmark:
        benchmark_of("recover_images", "{dataset}/{method}/ipc{ipc}/shard{shard}")
    message:
        "Recover {wildcards.method} on {wildcards.dataset}, {wildcards.ipc} per class, shard {wildcards.shard}"
    shell:
        JOB


# ---- select ----------------------------------------------------------------------------------


def select_images_input(w):
    files = {"description": DESCRIPTION.format(dataset=w.dataset), "train": real_images(w)}
    if method_of(w)["selection"] == "kmeans":
        place = {"dataset": w.dataset, "teacher": teacher_of(w)}
        files |= {"features": FEATURES.format(**place), "index": FEATURE_INDEX.format(**place)}
    return files


@settings_for
def select_images_settings(w):
    return {**pick(method_of(w), "selection"), "seed": config["seed"]}


rule select_images:
    input:
        unpack(select_images_input),
    output:
        shard=SHARD,
    wildcard_constraints:
        method=methods_of_kind("select"),
    params:
        settings=settings_of("select_images"),
        code=code_of("select_images"),
        job=describe_job,
    log:
        log_of("select_images", "{dataset}/{method}/ipc{ipc}/shard{shard}"),
    benchmark:
        benchmark_of("select_images", "{dataset}/{method}/ipc{ipc}/shard{shard}")
    message:
        "Select {wildcards.method} images of {wildcards.dataset}, {wildcards.ipc} per class"
    shell:
        JOB


# ---- gather ----------------------------------------------------------------------------------


def gather_images_input(w):
    return [
        SHARD.format(dataset=w.dataset, method=w.method, ipc=w.ipc, shard=s) for s in range(shard_total(w))
    ]


@settings_for
def gather_images_settings(w):
    return {}


rule gather_images:
    input:
        description=DESCRIPTION,
        shards=gather_images_input,
    output:
        images=DISTILLED,
        header=DISTILLED_HEADER,
        losses=DISTILLED_LOSSES,
        png=directory(DISTILLED_PNG),
    params:
        settings=settings_of("gather_images"),
        code=code_of("gather_images"),
        job=describe_job,
    log:
        log_of("gather_images", "{dataset}/{method}/ipc{ipc}"),
    benchmark:
        benchmark_of("gather_images", "{dataset}/{method}/ipc{ipc}")
    message:
        "Gather {wildcards.method} on {wildcards.dataset}, {wildcards.ipc} per class"
    shell:
        JOB
