"""The mixture-of-experts layer: route -> plan -> dispatch -> experts -> combine, one file each."""
