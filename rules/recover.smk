"""Make distilled images: recover them, or select real ones; then gather the shards into one set."""

# ---- recover ---------------------------------------------------------------------------------


rule recover_images:
    input:
        unpack(recover_images_input),
    output:
        shard=SHARD,
    log:
        log_of("recover_images", "{dataset}/{method}/ipc{ipc}/shard{shard}"),
    benchmark:
        benchmark_of("recover_images", "{dataset}/{method}/ipc{ipc}/shard{shard}")
    wildcard_constraints:
        method=methods_of_kind("recover"),
    conda:
        "../envs/wmdd.yaml"
    resources:
        local_gpu=local_gpu,
    params:
        settings=settings_of("recover_images"),
        code=code_of("recover_images"),
        behind=behind_of("recover_images"),
        job=describe_job,
    message:
        "Recover {wildcards.method} on {wildcards.dataset}, {wildcards.ipc} per class, shard {wildcards.shard}"
    shell:
        run_script("recover_images")


# ---- select ----------------------------------------------------------------------------------


rule select_images:
    input:
        unpack(select_images_input),
    output:
        shard=SHARD,
    log:
        log_of("select_images", "{dataset}/{method}/ipc{ipc}/shard{shard}"),
    benchmark:
        benchmark_of("select_images", "{dataset}/{method}/ipc{ipc}/shard{shard}")
    wildcard_constraints:
        method=methods_of_kind("select"),
    conda:
        "../envs/wmdd.yaml"
    params:
        settings=settings_of("select_images"),
        code=code_of("select_images"),
        behind=behind_of("select_images"),
        job=describe_job,
    message:
        "Select {wildcards.method} images of {wildcards.dataset}, {wildcards.ipc} per class"
    shell:
        run_script("select_images")


# ---- baselines -------------------------------------------------------------------------------


rule distil_baseline:
    input:
        unpack(distil_baseline_input),
    output:
        shard=SHARD,
    log:
        log_of("distil_baseline", "{dataset}/{method}/ipc{ipc}/shard{shard}"),
    benchmark:
        benchmark_of("distil_baseline", "{dataset}/{method}/ipc{ipc}/shard{shard}")
    wildcard_constraints:
        method=methods_of_kind("dm", "dc"),
    conda:
        "../envs/wmdd.yaml"
    resources:
        local_gpu=local_gpu,
    params:
        settings=settings_of("distil_baseline"),
        code=code_of("distil_baseline"),
        behind=behind_of("distil_baseline"),
        job=describe_job,
    message:
        "Distil {wildcards.method} on {wildcards.dataset}, {wildcards.ipc} per class"
    shell:
        run_script("distil_baseline")


# ---- external ------------------------------------------------------------------------------


rule import_images:
    input:
        description=DESCRIPTION,
        external=external_given,
    output:
        shard=SHARD,
    log:
        log_of("import_images", "{dataset}/{method}/ipc{ipc}/shard{shard}"),
    benchmark:
        benchmark_of("import_images", "{dataset}/{method}/ipc{ipc}/shard{shard}")
    wildcard_constraints:
        method=methods_of_kind("external"),
    conda:
        "../envs/wmdd.yaml"
    params:
        settings=settings_of("import_images"),
        code=code_of("import_images"),
        listing=external_listing,
        behind=behind_of("import_images"),
        job=describe_job,
    message:
        "Import {wildcards.method} for {wildcards.dataset}, {wildcards.ipc} per class"
    shell:
        run_script("import_images")


# ---- gather ----------------------------------------------------------------------------------


rule gather_images:
    input:
        description=DESCRIPTION,
        shards=gather_images_input,
    output:
        images=DISTILLED,
        header=DISTILLED_HEADER,
        losses=DISTILLED_LOSSES,
        png=directory(DISTILLED_PNG),
    log:
        log_of("gather_images", "{dataset}/{method}/ipc{ipc}"),
    benchmark:
        benchmark_of("gather_images", "{dataset}/{method}/ipc{ipc}")
    conda:
        "../envs/wmdd.yaml"
    params:
        settings=settings_of("gather_images"),
        code=code_of("gather_images"),
        behind=behind_of("gather_images"),
        job=describe_job,
    message:
        "Gather {wildcards.method} on {wildcards.dataset}, {wildcards.ipc} per class"
    shell:
        run_script("gather_images")
