"""The Wasserstein barycenter of each class's features: one job per class, or per block of classes."""


def block_of(class_index, dataset):
    """The block of classes that one job handles, as its wildcard: `3`, or `0-49`."""
    size = config.get("classes_per_job", 1)
    first = class_index // size * size
    last = min(first + size, class_total(dataset)) - 1
    return str(first) if first == last else f"{first}-{last}"


@settings_for
def compute_barycenter_settings(w):
    return {**entry("barycenters", w.barycenter, w.dataset), "seed": config["seed"]}


rule compute_barycenter:
    input:
        features=FEATURES,
        index=FEATURE_INDEX,
    output:
        barycenter=BARYCENTER,
    params:
        settings=settings_of("compute_barycenter"),
        code=code_of("compute_barycenter"),
        job=describe_job,
    log:
        log_of("compute_barycenter", "{dataset}/{teacher}/{barycenter}/ipc{ipc}/class{block}"),
    benchmark:
        benchmark_of("compute_barycenter", "{dataset}/{teacher}/{barycenter}/ipc{ipc}/class{block}")
    message:
        "Barycenter of class {wildcards.block} of {wildcards.dataset}, {wildcards.ipc} per class"
    shell:
        JOB
