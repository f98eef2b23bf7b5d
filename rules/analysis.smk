"""Measurements behind the figures of the appendices: distances, t-SNE maps, the barycenter's convergence."""


rule measure_distances:
    input:
        unpack(measure_distances_input),
    output:
        **figure_files(),
    log:
        log_of("measure_distances", "{figure}"),
    benchmark:
        benchmark_of("measure_distances", "{figure}")
    wildcard_constraints:
        figure=figures_of_kind("distances"),
    conda:
        "../envs/wmdd.yaml"
    resources:
        local_gpu=local_gpu,
    params:
        **params_of("measure_distances"),
    message:
        "Figure {wildcards.figure}"
    shell:
        run_script("measure_distances")


rule embed_tsne:
    input:
        unpack(embed_tsne_input),
    output:
        **figure_files(),
        points=f"{FIGURE}.points.csv",
    log:
        log_of("embed_tsne", "{figure}"),
    benchmark:
        benchmark_of("embed_tsne", "{figure}")
    wildcard_constraints:
        figure=figures_of_kind("tsne"),
    conda:
        "../envs/wmdd.yaml"
    resources:
        local_gpu=local_gpu,
    params:
        **params_of("embed_tsne"),
    message:
        "Figure {wildcards.figure}"
    shell:
        run_script("embed_tsne")


rule trace_barycenters:
    input:
        unpack(trace_barycenters_input),
    output:
        **figure_files(),
    log:
        log_of("trace_barycenters", "{figure}"),
    benchmark:
        benchmark_of("trace_barycenters", "{figure}")
    wildcard_constraints:
        figure=figures_of_kind("barycenter_iterations"),
    conda:
        "../envs/wmdd.yaml"
    params:
        **params_of("trace_barycenters"),
    message:
        "Figure {wildcards.figure}"
    shell:
        run_script("trace_barycenters")
