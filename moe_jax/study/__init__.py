"""What experiments share: arms with seeds, intervals over seeds, tables, plots.

arms.run_arms trains every arm with every seed, once. results.seed_mean and results.seed_difference
turn the runs into measurements with 95% intervals. results.publish writes them.
"""
