"""Measurements behind the figures of the appendices: distances, t-SNE maps, the barycenter's convergence."""


rule measure_distances:
    input:
        unpack(measure_distances_input),
    output:
        png=report(
            f"{FIGURE}.png",
            category="Figures",
            caption="../report/figure.rst",
            labels={"figure": "{figure}"},
        ),
        pdf=f"{FIGURE}.pdf",
        csv=f"{FIGURE}.csv",
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
        settings=settings_of("measure_distances"),
        code=code_of("measure_distances"),
        job=describe_job,
    message:
        "Figure {wildcards.figure}"
    shell:
        run_script("measure_distances")


rule embed_tsne:
    input:
        unpack(embed_tsne_input),
    output:
        png=report(
            f"{FIGURE}.png",
            category="Figures",
            caption="../report/figure.rst",
            labels={"figure": "{figure}"},
        ),
        pdf=f"{FIGURE}.pdf",
        csv=f"{FIGURE}.csv",
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
        settings=settings_of("embed_tsne"),
        code=code_of("embed_tsne"),
        job=describe_job,
    message:
        "Figure {wildcards.figure}"
    shell:
        run_script("embed_tsne")


rule trace_barycenters:
    input:
        unpack(trace_barycenters_input),
    output:
        png=report(
            f"{FIGURE}.png",
            category="Figures",
            caption="../report/figure.rst",
            labels={"figure": "{figure}"},
        ),
        pdf=f"{FIGURE}.pdf",
        csv=f"{FIGURE}.csv",
    log:
        log_of("trace_barycenters", "{figure}"),
    benchmark:
        benchmark_of("trace_barycenters", "{figure}")
    wildcard_constraints:
        figure=figures_of_kind("barycenter_iterations"),
    conda:
        "../envs/wmdd.yaml"
    params:
        settings=settings_of("trace_barycenters"),
        code=code_of("trace_barycenters"),
        job=describe_job,
    message:
        "Figure {wildcards.figure}"
    shell:
        run_script("trace_barycenters")
