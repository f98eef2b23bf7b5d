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
        **step_params("recover_images"),
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
        **step_params("select_images"),
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
        **step_params("distil_baseline"),
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
        **step_params("import_images"),
        files=external_stamp,
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
        **step_params("gather_images"),
    message:
        "Gather {wildcards.method} on {wildcards.dataset}, {wildcards.ipc} per class"
    shell:
        run_script("gather_images")
