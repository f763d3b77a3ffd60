"""What starts the processes of a job: this machine, or dask."""
