#!/usr/bin/env bash
# Kubernetes API priority and fairness (k8s.io/apiserver 0.34.4): a priority level without any seat executes one request at a time.
#
# `nominalConcurrencyShares: 0` of a PriorityLevelConfiguration gives the level a concurrency limit of zero; the API's own
# comment calls that a jail, which holds requests. With `limitResponse: {type: Reject}`, and neither lending nor borrowing, one would
# expect that whoever is led there gets 429 for everything. But a request that needs more seats than the whole limit is executed when nothing
# else of that level is, so that no request is too wide for ever; and at a limit of zero that is each one. A client that asks for
# one thing after the other, as controllers mostly do, notices nothing at all. Only what comes beside another request is refused.
#
# Seen with k8s.io/apiserver v0.34.4: of three requests of one seat, one after the other, three were executed; of three at once,
# one. An API server of v1.34.4 served a controller that was led to such a level as if nothing were.
set -euo pipefail
command -v go >/dev/null || { echo "needs Go 1.24 or newer" >&2; exit 2; }
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
cat >go.mod <<'MOD'
module trial

go 1.24.0

require k8s.io/apiserver v0.34.4
MOD
cat >main.go <<'GO'
package main

import (
	"context"
	"fmt"
	"time"

	"k8s.io/apiserver/pkg/util/flowcontrol/fairqueuing"
	"k8s.io/apiserver/pkg/util/flowcontrol/fairqueuing/eventclock"
	"k8s.io/apiserver/pkg/util/flowcontrol/fairqueuing/queueset"
	"k8s.io/apiserver/pkg/util/flowcontrol/metrics"
	"k8s.io/apiserver/pkg/util/flowcontrol/request"
)

// A gauge that nobody reads.
type quiet struct{}

func (quiet) Inc()                   {}
func (quiet) Dec()                   {}
func (quiet) Add(float64)            {}
func (quiet) Set(float64)            {}
func (quiet) SetDenominator(float64) {}
func (quiet) SetToCurrentTime()      {}

func level(limit int) fairqueuing.QueueSet {
	factory := queueset.NewQueueSetFactory(eventclock.Real{})
	// No queues: what cannot be executed at once is rejected.
	config := fairqueuing.QueuingConfig{Name: "closed"}
	pair := metrics.RatioedGaugePair{RequestsWaiting: quiet{}, RequestsExecuting: quiet{}}
	begun, err := factory.BeginConstruction(config, pair, quiet{}, quiet{})
	if err != nil {
		panic(err)
	}
	return begun.Complete(fairqueuing.DispatchingConfig{ConcurrencyLimit: limit, ConcurrencyDenominator: 1})
}

// Starts a request of one seat; nothing if it is rejected.
func start(level fairqueuing.QueueSet) fairqueuing.Request {
	one := &request.WorkEstimate{InitialSeats: 1}
	started, _ := level.StartRequest(context.Background(), one, 1, "", "closed", "user", "request", func(bool) {})
	return started
}

func count(limit int) (apart, together int) {
	one := level(limit)
	for range 3 {
		if started := start(one); started != nil && !started.Finish(func() { apart++ }) {
			time.Sleep(10 * time.Millisecond)
		}
	}
	two := level(limit)
	for range 3 {
		if start(two) != nil {
			together++
		}
	}
	return apart, together
}

func main() {
	for _, limit := range []int{0, 1, 2} {
		apart, together := count(limit)
		fmt.Printf("%d seats: %d of 3 in turn, %d of 3 at once\n", limit, apart, together)
	}
}
GO
go mod tidy >/dev/null 2>&1
told="$(go run .)"
echo "$told"
[[ "$(sed -n 1p <<<"$told")" == "0 seats: 3 of 3 in turn, 1 of 3 at once" ]]
[[ "$(sed -n 3p <<<"$told")" == "2 seats: 3 of 3 in turn, 2 of 3 at once" ]]
