# What CI runs.
check:
    ./test

# Formatting, lints and the tests that need nothing installed.
quick:
    ./test quick

# The tests alone, without the other checks.
test:
    cargo test --locked --workspace

# Two machines, three services, an allowed and a denied connection.
demo:
    cargo run --release -p hauberk-cli -- demo

# The generated code of the wire format.
generate:
    cargo run -p hauberk-proto-generate

# Hauberk beside raw TCP, plain relays, haproxy and stunnel: half an hour, as root, with haproxy,
# stunnel4 and util-linux installed. More options after it: `just bench --before PATH` measures an earlier build as well.
bench *options:
    cargo run --release -p hauberk-bench -- run --rounds 3 --seconds 2 --out docs {{options}}

# PostgreSQL, Redis and iperf3, straight and through the mesh: a minute, as root, with those three installed.
bench-apps *options:
    cargo run --release -p hauberk-bench -- apps {{options}}

# The same in under five minutes, without writing anything.
bench-quick:
    cargo run --release -p hauberk-bench -- run --quick

# A million connections and 16 GiB of bulk, and whether memory and open files come back: about five minutes, as root.
soak:
    cargo run --release -p hauberk-bench -- soak
