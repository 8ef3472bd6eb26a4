"""The laboratory: data, networks, training, sweeps and reports (extra ``lab``)."""
