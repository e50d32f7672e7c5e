package e2e

// The cost of a request, compared with the cost of its indispensable parts. The service runs
// in a process of its own and alternates with the server that it is compared with, so that
// both meet the same load. The ratios count, not the times.

import (
	"encoding/base64"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"go.etcd.io/bbolt"
)

// manyContracts is the number of contracts in a file unless a benchmark needs another.
const manyContracts = 100_000

var (
	getOne  = message{method: "GET", path: benchContract}
	listAll = message{method: "GET", path: benchContracts}
	putOne  = message{method: "PUT", path: benchContract, header: jsonType, body: benchBody}
	putYear = message{method: "PUT", path: benchContract, header: jsonType, body: year(8760)}
)

// pairs measures two sides in turn, b.N times each. Both make the same number of requests and
// return the time they took. It reports the median of the ratios of their rates.
func pairs(b *testing.B, of string, requests int, ours, theirs func() time.Duration) {
	b.Helper()
	var our, their, ratios []float64
	for b.Loop() {
		var x, y time.Duration
		if len(ratios)%2 == 0 {
			x = ours()
			y = theirs()
		} else {
			y = theirs()
			x = ours()
		}
		our, their = append(our, float64(requests)/x.Seconds()), append(their, float64(requests)/y.Seconds())
		ratios = append(ratios, y.Seconds()/x.Seconds())
	}
	b.ReportMetric(median(ratios), "of-"+of)
	b.ReportMetric(median(our), "ours/s")
	b.ReportMetric(median(their), of+"/s")
	b.ReportMetric(0, "ns/op")
}

// inTurn measures two servers, each with its own connections.
func inTurn(b *testing.B, of string, each int, ours, theirs []*line) {
	b.Helper()
	pairs(b, of, len(ours)*each,
		func() time.Duration { return round(b, ours, each) },
		func() time.Duration { return round(b, theirs, each) })
}

// requestsEach returns the number of requests of each of n connections in a round of about all
// requests. Few connections make fewer, since their requests wait for each other.
func requestsEach(n, all int) int { return max(1, min(all/n, all/8)) }

// BenchmarkGet compares a GET of one contract with the router alone, which sends as many
// bytes.
func BenchmarkGet(b *testing.B) { besideRouter(b, getOne, 12_000, 1, 16, 64, 256) }

// BenchmarkList compares a list of 100 contracts with the router alone.
func BenchmarkList(b *testing.B) { besideRouter(b, listAll, 6400, 1, 64) }

func besideRouter(b *testing.B, m message, requests int, connections ...int) {
	service := served(b, benchFile(b, manyContracts))
	one := service.lines(b, 1, m, 1)[0]
	if err := one.ask(); err != nil {
		b.Fatal(err)
	}
	router := bare(b, "answer", writeFile(b, one.content))
	for _, n := range connections {
		b.Run(fmt.Sprintf("connections=%d", n), func(b *testing.B) {
			inTurn(b, "router", requestsEach(n, requests), service.lines(b, n, m, manyContracts), router.lines(b, n, m, manyContracts))
		})
	}
}

// BenchmarkPut compares a durable PUT with bbolt behind a committer, on a file of the same
// size, and with a router that has only that committer behind it.
func BenchmarkPut(b *testing.B) {
	file := benchFile(b, manyContracts)
	service, raw, router := served(b, copyOf(b, file)), newRawStore(b, copyOf(b, file)), bare(b, "put", copyOf(b, file))
	for _, n := range []int{1, 16, 64, 256} {
		b.Run(fmt.Sprintf("connections=%d", n), func(b *testing.B) {
			ours, each := service.lines(b, n, putOne, manyContracts), requestsEach(n, 6400)
			pairs(b, "bbolt", n*each,
				func() time.Duration { return round(b, ours, each) },
				func() time.Duration { return raw.round(b, n, each, manyContracts) })
		})
	}
	b.Run("connections=64/router", func(b *testing.B) {
		inTurn(b, "router", requestsEach(64, 6400), service.lines(b, 64, putOne, manyContracts), router.lines(b, 64, putOne, manyContracts))
	})
}

// BenchmarkPutLatency compares the median latency of a single durable PUT with that of
// db.Update, and with that of a router whose handler only calls db.Update.
func BenchmarkPutLatency(b *testing.B) {
	const each = 500
	file := benchFile(b, manyContracts)
	ours := served(b, copyOf(b, file)).lines(b, 1, putOne, manyContracts)
	router := bare(b, "update", copyOf(b, file)).lines(b, 1, putOne, manyContracts)
	db, err := bbolt.Open(copyOf(b, file), 0o600, nil)
	if err != nil {
		b.Fatal(err)
	}
	defer db.Close()
	value := benchValue(b)
	var ofUpdate, ofRouter, routerOfUpdate []float64
	for b.Loop() {
		round(b, ours, each)
		round(b, router, each)
		var took []time.Duration
		for range each {
			key := benchKey(rand.IntN(manyContracts)).bytes()
			began := time.Now()
			if err := updateOne(db, key, value); err != nil {
				b.Fatal(err)
			}
			took = append(took, time.Since(began))
		}
		our, their, update := float64(median(ours[0].took)), float64(median(router[0].took)), float64(median(took))
		ofUpdate = append(ofUpdate, our/update)
		ofRouter = append(ofRouter, our/their)
		routerOfUpdate = append(routerOfUpdate, their/update)
	}
	b.ReportMetric(median(ofUpdate), "×update")
	b.ReportMetric(median(ofRouter), "×router")
	b.ReportMetric(median(routerOfUpdate), "router×update")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkPutYear compares a PUT of 8,760 prices with a handler that uses encoding/json and
// the validator's dive.
func BenchmarkPutYear(b *testing.B) {
	const each, contracts = 30, 100
	file := benchFile(b, contracts)
	service, dive := served(b, copyOf(b, file)), bare(b, "dive", copyOf(b, file))
	inTurn(b, "dive", each, service.lines(b, 1, putYear, contracts), dive.lines(b, 1, putYear, contracts))
}

// BenchmarkAllocations measures the allocations of each endpoint in the process of the server.
func BenchmarkAllocations(b *testing.B) {
	service := served(b, benchFile(b, manyContracts))
	basic := "Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(bench.client.ID+":"+bench.client.Secret)) + "\r\n"
	deleted := allocationRequests // those before are for the others
	form := "Content-Type: application/x-www-form-urlencoded\r\n"
	for _, m := range []struct {
		name string
		message
	}{
		{"GET", getOne},
		{"GET-304", message{method: "GET", path: benchContract, header: "If-None-Match: *\r\n"}},
		{"HEAD", message{method: "HEAD", path: benchContract}},
		{"list", listAll},
		{"PUT", putOne},
		{"PATCH", message{method: "PATCH", path: benchContract, header: "Content-Type: application/merge-patch+json\r\n", body: `{"supplier":"Fjord Kraft"}`}},
		{"POST", message{method: "POST", path: benchContracts, header: jsonType, body: benchBody}},
		{"DELETE", message{method: "DELETE", path: benchContract}},
		{"revoke", message{method: "POST", path: revocationPath + "/", header: basic + form, body: "token=unknown"}},
		{"token", message{method: "POST", path: tokenPath + "/", header: basic + form, body: "grant_type=client_credentials"}},
		{"healthz", message{method: "GET", path: "/healthz"}},
		{"readyz", message{method: "GET", path: "/readyz"}},
		{"metadata", message{method: "GET", path: metadataPath}},
		{"openapi.json", message{method: "GET", path: openAPIPath}},
		{"PUT-8760-prices", putYear},
		{"GET-8760-prices", getOne},
	} {
		b.Run(m.name, func(b *testing.B) {
			from := 0
			if m.method == "DELETE" {
				from = deleted
				deleted += allocationRequests
			}
			objects, bytes := service.allocations(b, m.message, from)
			b.ReportMetric(objects, "allocs/request")
			b.ReportMetric(bytes, "B/request")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// A read allocates the same for any size of the file and of the contract.
func TestReadsAllocateNoMoreForMore(t *testing.T) {
	long(t)
	few, many := served(t, benchFile(t, allocationRequests)), served(t, benchFile(t, 20_000))
	for _, m := range []message{getOne, listAll} {
		of, _ := few.allocations(t, m, 0)
		ofMany, _ := many.allocations(t, m, 0)
		if ofMany > of+1 {
			t.Errorf("%s %s: %v allocations with few contracts, %v with 20,000", m.method, m.path, of, ofMany)
		}
	}
	small, _ := few.allocations(t, getOne, 0)
	few.allocations(t, putYear, 0)
	if large, _ := few.allocations(t, getOne, 0); large > small+3 {
		t.Errorf("GET: %v allocations for a small contract, %v for one of 8,760 prices", small, large)
	}
}

// BenchmarkMillion uses a million contracts. It compares the time until the service is ready
// with a process that does nothing, measures the private memory after random GETs, and
// compares the rates with those for ten thousand contracts.
func BenchmarkMillion(b *testing.B) {
	million := benchFile(b, 1_000_000)
	b.Run("ready", func(b *testing.B) {
		pairs(b, "nothing", 1,
			func() time.Duration { return timeToReady(b, million) },
			func() time.Duration {
				began := time.Now()
				if err := command(b, nil, "version").Run(); err != nil {
					b.Fatal(err)
				}
				return time.Since(began)
			})
	})
	b.Run("service", func(b *testing.B) {
		large, small := served(b, million), served(b, benchFile(b, 10_000))
		b.Run("memory", func(b *testing.B) {
			lines := large.lines(b, 64, getOne, 1_000_000)
			for b.Loop() {
				round(b, lines, 100_000/64)
			}
			b.ReportMetric(large.memory(b, "RssAnon"), "MB")
			b.ReportMetric(0, "ns/op")
		})
		besideSmall := func(b *testing.B, m message, n int) {
			inTurn(b, "10000", requestsEach(n, 6400), large.lines(b, n, m, 1_000_000), small.lines(b, n, m, 10_000))
		}
		b.Run("GET", func(b *testing.B) { besideSmall(b, getOne, 64) })
		for _, n := range []int{1, 64} {
			b.Run(fmt.Sprintf("PUT/connections=%d", n), func(b *testing.B) { besideSmall(b, putOne, n) })
		}
	})
	// The part of bbolt alone: its tree has more pages above a key. It comes last, since it
	// writes values that the service could not read.
	b.Run("bbolt/connections=64", func(b *testing.B) {
		large, small := newRawStore(b, million), newRawStore(b, benchFile(b, 10_000))
		pairs(b, "10000", 64*200,
			func() time.Duration { return large.round(b, 64, 200, 1_000_000) },
			func() time.Duration { return small.round(b, 64, 200, 10_000) })
	})
}
